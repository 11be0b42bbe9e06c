// Brings the large files of the bundle here, checks every piece of them and keeps them for offline use.

export class FileError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind; // "offline", "missing" or "damaged"
  }
}

const CACHE = `cusprun ${new URL("./", location.href).pathname}`;
export const keyOf = (file) => `${file.path}?sha256=${file.sha256}`;

// Whether this browser can keep files: only for https and localhost.
export const canKeep = () => "caches" in globalThis;

// The files as Blobs, by path. `report` is told the bytes that are here. `kept` is false where there was no room.
export async function bring(files, pieceBytes, report) {
  const cache = canKeep() ? await caches.open(CACHE) : null;
  const here = new Map();
  const blobs = new Map();
  let kept = cache !== null;
  for (const file of files) {
    const tell = (bytes) => {
      here.set(file.path, bytes);
      report([...here.values()].reduce((sum, one) => sum + one, 0));
    };
    let blob = cache && (await find(cache, file));
    if (!blob && kept) {
      blob = await attempt(async (body) => {
        await cache.put(keyOf(file), body);
        return find(cache, file);
      }, file, pieceBytes, tell);
      kept = blob !== null;
    }
    blob ??= await attempt((body) => body.blob(), file, pieceBytes, tell);
    tell(file.bytes);
    blobs.set(file.path, blob);
  }
  return { blobs, kept };
}

async function find(cache, file) {
  const blob = await (await cache.match(keyOf(file)))?.blob();
  return blob?.size === file.bytes ? blob : null;
}

// What `use` makes of the file as it arrives; null where there is no room for it. The cache reports any error in the
// body as one of its own, so that the reason is kept beside it.
async function attempt(use, file, pieceBytes, tell) {
  let reason = null;
  let response;
  try {
    response = await fetch(file.path, { cache: "no-cache" });
  } catch {
    throw new FileError("offline", file.path);
  }
  if (!response.ok) throw new FileError("missing", `${file.path}: HTTP ${response.status}`);
  const type = file.path.endsWith(".wasm") ? "application/wasm" : "application/octet-stream";
  const body = response.body.pipeThrough(checking(file, pieceBytes, tell, (error) => (reason = error)));
  try {
    return await use(new Response(body, { headers: { "Content-Type": type } }));
  } catch (error) {
    if (error.name === "QuotaExceededError") return null;
    throw reason ?? new FileError("offline", file.path);
  }
}

// Passes a file on in pieces, each only when its hash is right.
function checking(file, pieceBytes, tell, blame) {
  let piece = new Uint8Array(pieceBytes);
  let filled = 0;
  let index = 0;
  const damaged = () => {
    const error = new FileError("damaged", file.path);
    blame(error);
    return error;
  };
  const check = async (bytes) => {
    const wanted = file.pieces[index++];
    if (wanted === undefined) throw damaged();
    if (!globalThis.crypto?.subtle) return; // plain http: nothing could be trusted there anyway
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    if (Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") !== wanted) throw damaged();
  };
  return new TransformStream({
    async transform(data, controller) {
      for (let rest = data; rest.length; ) {
        const part = rest.subarray(0, pieceBytes - filled);
        piece.set(part, filled);
        filled += part.length;
        rest = rest.subarray(part.length);
        if (filled === pieceBytes) {
          await check(piece);
          controller.enqueue(piece);
          piece = new Uint8Array(pieceBytes);
          filled = 0;
        }
      }
      tell(Math.min(file.bytes, index * pieceBytes + filled));
    },
    async flush(controller) {
      const last = piece.subarray(0, filled);
      if (filled) await check(last);
      if (index !== file.pieces.length) throw damaged();
      if (filled) controller.enqueue(last);
    },
  });
}
