"""A server: the GGUF with a start script, a systemd unit and a Dockerfile around llama.cpp's server.

The API key comes from the environment; without one the script listens on the loopback interface alone.
"""

from __future__ import annotations

from cusprun.deploy.expert import Expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import PER_LAYER, Notes, Wish
from cusprun.errors import InvalidRequest
from cusprun.runtimes.gguf_header import load_metadata

LONGEST_CONTEXT = 8192  # tokens of one request
SLOTS = 4  # requests at a time
START = """#!/bin/sh
# Serves the model. HOST and PORT say where; other computers are let in only with a key in LLAMA_API_KEY.
cd "$(dirname "$0")" || exit 1
HOST="${{HOST:-127.0.0.1}}"
case "$HOST" in
  127.*|localhost|::1) ;;
  *) if [ -z "${{LLAMA_API_KEY:-}}" ]; then
       echo "HOST=$HOST lets other computers in: put a key into LLAMA_API_KEY" >&2
       exit 2
     fi ;;
esac
if ! command -v llama-server >/dev/null 2>&1; then
  echo "llama-server is missing: install llama.cpp, see README.md" >&2
  exit 1
fi
exec llama-server --model "{gguf}" --host "$HOST" --port "${{PORT:-8080}}" --ctx-size {context} --parallel {slots} \\
  --jinja --metrics --no-webui "$@"
"""
HEALTH = """#!/bin/sh
# Exit code 0 once the model is loaded and answers.
exec curl --fail --silent --show-error --max-time 5 "http://127.0.0.1:${PORT:-8080}/health"
"""
UNIT = """[Unit]
Description={name}, a language model
After=network.target

[Service]
ExecStart=/opt/{name}/start.sh
# LLAMA_API_KEY, HOST and PORT, readable by root alone:
EnvironmentFile=-/etc/{name}.env
DynamicUser=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
NoNewPrivileges=yes
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
"""
DOCKERFILE = """# docker build --build-arg LLAMA_SERVER_IMAGE=IMAGE -t {tag} .
# IMAGE is an image of llama.cpp's project with llama-server and curl in it.
ARG LLAMA_SERVER_IMAGE
FROM ${{LLAMA_SERVER_IMAGE}}
WORKDIR /model
COPY {gguf} start.sh health.sh ./
ENV HOST=0.0.0.0 PORT=8080 PATH="/app:${{PATH}}"
EXPOSE 8080
USER 65534:65534
HEALTHCHECK --interval=30s --start-period=60s CMD ["/bin/sh", "/model/health.sh"]
ENTRYPOINT ["/bin/sh", "/model/start.sh"]
"""


def gather(expert: Expert, files: Files, wish: Wish) -> Notes:
    """Adds the GGUF and what starts it. Raises InvalidRequest where the wish is for ONNX."""
    if wish.format not in (None, "gguf"):
        raise InvalidRequest("--target server takes a GGUF: leave --format out, or ship the ONNX model to a laptop")
    artifact = expert.of("gguf", wish.quant)
    gguf, info = artifact.path.name, load_metadata(artifact.path)
    context = SLOTS * min(info.context_length or LONGEST_CONTEXT, LONGEST_CONTEXT)
    files.add(gguf, artifact.path)
    files.add("start.sh", START.format(gguf=gguf, context=context, slots=SLOTS), executable=True)
    files.add("health.sh", HEALTH, executable=True)
    files.add(f"{expert.name}.service", UNIT.format(name=expert.name))
    files.add("Dockerfile", DOCKERFILE.format(gguf=gguf, tag=expert.name.lower()))
    start = (
        "With [llama.cpp](https://github.com/ggml-org/llama.cpp) installed, for this computer alone:\n\n"
        "    ./start.sh\n\n"
        "For others, behind a proxy that speaks TLS:\n\n    LLAMA_API_KEY=... HOST=0.0.0.0 ./start.sh\n\n"
        f"It answers OpenAI's API on port 8080, {SLOTS} requests at a time; `/health` (see `health.sh`) and `/metrics` "
        f"tell how it is. As a service: copy this folder to `/opt/{expert.name}`, put the key into "
        f"`/etc/{expert.name}.env`, then\n\n"
        f"    cp {expert.name}.service /etc/systemd/system/ && systemctl enable --now {expert.name}\n\n"
        "As a container, with llama.cpp's server image as a base:\n\n"
        f"    docker build --build-arg LLAMA_SERVER_IMAGE=... -t {expert.name.lower()} .\n"
        f"    docker run -e LLAMA_API_KEY=... -p 127.0.0.1:8080:8080 {expert.name.lower()}\n\n"
        "With cusprun:\n\n    cusprun-edge serve ."
    )
    version = f" that knows the architecture `{info.architecture}`" if info.architecture in PER_LAYER else ""
    return Notes(
        start,
        (f"llama.cpp{version}", "curl, for the health check"),
        ("the service and the container were not started where this bundle was made: the GGUF was, by llama.cpp's "
         "library",),
    )  # fmt: skip
