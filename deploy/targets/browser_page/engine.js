// The expert in wllama: llama.cpp as WebAssembly in a worker, on one thread or on several.

import { Wllama } from "./wllama/wllama.js";

const BATCH = 128; // tokens of a prompt at once; more costs memory and gains nothing here
const MIB = 2 ** 20;
const FAILURE = /(?:error loading model|failed to initialize the context): (.+)/;
const BUFFER = / (\S+) buffer size = +([\d.]+) MiB/;
// A model without a chat template gets the talk as paragraphs.
const PLAIN = "{% for message in messages %}{{ message.content + '\\n\\n' }}{% endfor %}";
// The smallest modules with a vector and with a try block in them.
const VECTORS = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
const EXCEPTIONS = [0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 8, 1, 6, 0, 6, 64, 25, 11, 11];

// What this browser lacks, in words; null where it has everything.
export function lacking() {
  if (typeof WebAssembly !== "object") return "WebAssembly";
  if (!WebAssembly.validate(new Uint8Array(VECTORS))) return "vectors in WebAssembly (SIMD)";
  if (!WebAssembly.validate(new Uint8Array(EXCEPTIONS))) return "exceptions in WebAssembly";
  return null;
}

// Safari has no 64-bit memory, and of the rest only Firefox does without promises in WebAssembly.
export function needsCompat() {
  let wide = true;
  try {
    new WebAssembly.Memory({ address: "i64", initial: 1n });
  } catch {
    wide = false;
  }
  return !wide || !(WebAssembly.Suspending || /Firefox\//.test(navigator.userAgent));
}

// Half of what the device has, as the other half are often the slower halves of the same cores; two at least.
export function chooseThreads(wanted) {
  const most = navigator.hardwareConcurrency || 1;
  if (!globalThis.crossOriginIsolated) return 1;
  return wanted ? Math.min(wanted, most) : Math.min(most, 8, Math.max(2, Math.floor(most / 2)));
}

export class Engine {
  #wllama;
  #log = [];
  #buffers = 0;

  // `blobs` by path; `compat` says which build of wllama is among them. Throws what llama.cpp says where it fails.
  async start(bundle, blobs, threads, compat) {
    const keep = (...words) => this.#listen(words.join(" "));
    const logger = { debug: keep, log: keep, warn: keep, error: keep };
    const build = bundle.engine[compat ? "compat" : "default"];
    const wasm = URL.createObjectURL(blobs.get(build.wasm.path));
    this.#wllama = new Wllama({ default: wasm }, { logger });
    const code = compat ? await blobs.get(build.worker.path).text() : "";
    this.#wllama.setCompat(compat ? { wasm, worker: { code } } : null, "firefox_safari");
    const parts = bundle.model.map((file) => blobs.get(file.path));
    await this.#wllama.loadModel(parts, {
      n_ctx: bundle.context,
      n_threads: threads,
      n_gpu_layers: 0,
      n_parallel: 1,
      n_batch: BATCH,
      n_ubatch: BATCH,
      jinja: true,
      chat_template: bundle.chat_template ? undefined : PLAIN,
      reasoning_format: "none",
      warmup: false,
    });
    URL.revokeObjectURL(wasm);
    if (!this.#wllama.getModelMetadata().hparams.nLayer) {
      const reasons = this.#log.map((line) => FAILURE.exec(line)?.[1]).filter(Boolean);
      throw new Error(reasons[0] ?? (this.#log.slice(-3).join("; ") || "llama.cpp gave no reason"));
    }
  }

  get threads() {
    return this.#wllama.getNumThreads();
  }

  // Bytes of the buffers that llama.cpp says it has: weights, cache, working space.
  get bytes() {
    return this.#buffers;
  }

  // Streams an answer: `onText` gets each piece, `onFigures` llama.cpp's own timings. Returns why it ended.
  async answer(turns, { longest, temperature, signal, onText, onFigures }) {
    let reason = null;
    const options = {
      messages: turns,
      max_tokens: longest,
      temperature,
      top_p: 0.95,
      top_k: 0,
      min_p: 0,
      seed: 0,
      cache_prompt: true,
      timings_per_token: true,
      stream: true,
      abortSignal: signal,
      onData: (chunk) => {
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) onText(choice.delta.content);
        if (chunk.timings) onFigures(chunk.timings);
        reason = choice?.finish_reason ?? reason;
      },
    };
    await this.#wllama.createChatCompletion(options);
    return reason;
  }

  #listen(line) {
    const found = BUFFER.exec(line);
    if (found) this.#buffers += Number(found[2]) * MIB;
    this.#log = [...this.#log.slice(-19), line];
  }
}
