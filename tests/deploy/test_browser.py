"""The browser bundle in headless Chromium: it answers with threads and without, online and off."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cusprun.deploy.expert import Expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import Wish
from cusprun.deploy.targets.browser import gather
from cusprun.runtimes import Message, Sampling, open_runtime
from tests.chromium import open_chromium
from tests.deploy.bundles_made import make_expert, plain_server, write_files

pytestmark = pytest.mark.browser
READY, FAILED = "#send:enabled", "#problem:visible"
WORD = re.compile(r"[A-Za-z]{2,}")
# Notes what the page tells while it loads.
WATCH = """addEventListener("DOMContentLoaded", () => {
  const [bar, text] = ["progress", "loading-text"].map((id) => document.getElementById(id));
  globalThis.told = [];
  new MutationObserver(() => told.push([bar.value, text.textContent])).observe(text, {childList: true});
})"""
QUESTION = "The tenant shall pay the rent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Expert:
    return make_expert(tmp_path_factory.mktemp("expert"))


@pytest.fixture(scope="module")
def bundle(expert: Expert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = Files()
    gather(expert, files, Wish())
    return write_files(files, tmp_path_factory.mktemp("bundle"))


class Visit:
    """A page of a bundle, with all that was asked for and said on the way."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.page = context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        context.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda line: self.said.append(line.text) if line.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def open(self, address: str, threads: int | None = 1) -> None:
        self.page.goto(f"{address}?threads={threads}" if threads else address)
        self.wait()

    def wait(self) -> None:
        self.page.locator(f"{READY}, {FAILED}").first.wait_for()
        assert not self.page.locator(FAILED).count(), self.text("problem-text")

    def ask(self, question: str = QUESTION, tokens: int = 16) -> str:
        """The answer, once it is complete."""
        count = self.page.locator(".answered").count()
        self.page.locator("#longest").evaluate("(field, value) => { field.value = value }", str(tokens))
        self.page.locator("#question").fill(question)
        self.page.locator("#question").press("Enter")
        self.page.locator(".answered").nth(count).wait_for(state="attached")
        self.page.locator(READY).wait_for()
        return str(self.page.locator(".answered > p:not(.note)").last.text_content())

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#{name}").text_content())

    @property
    def speed(self) -> float:
        """Tokens per second, as shown."""
        return float(self.text("speed").removesuffix(" tokens/s"))

    @property
    def threads(self) -> int:
        return int(self.text("threads").split()[0])

    def is_sound(self, address: str) -> bool:
        foreign = [url for url in self.asked if not url.startswith((address, f"blob:{address}"))]
        assert foreign == []
        assert self.said == []
        return True


@contextmanager
def visit(browser: Any, offline_use: bool = True, **settings: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, **settings)
    if not offline_use:
        context.add_init_script("delete Navigator.prototype.serviceWorker")
    context.set_default_timeout(60_000)
    yield Visit(context)
    context.close()


def expected(expert: Expert, tokens: int = 16) -> str:
    """What llama.cpp says outside a browser."""
    runtime = open_runtime(expert.of("gguf").path, context=512, threads=1)
    prompt = runtime.encode(runtime.chat_prompt([Message("user", QUESTION)]), special=True)
    text = runtime.decode(list(runtime.generate(prompt, Sampling(max_tokens=tokens))))
    runtime.close()
    return text


def test_from_a_plain_server_on_one_thread(browser: Any, bundle: Path, expert: Expert) -> None:
    """Without service workers nobody can add the headers; per-layer widths compute as they do natively."""
    with plain_server(bundle) as address, visit(browser, offline_use=False) as seen:
        seen.open(address, threads=None)
        assert not seen.page.evaluate("crossOriginIsolated")
        assert seen.threads == 1
        answer = seen.ask()
        assert WORD.search(answer)
        assert answer == expected(expert)
        assert seen.speed > 0
        assert re.fullmatch(r"\d+(\.\d)? MB", seen.text("memory"))
        assert seen.is_sound(address)


def test_the_network_is_cut_after_the_first_visit(browser: Any, bundle: Path) -> None:
    """The page's own service worker isolates it, so that it has threads from a plain server, and keeps it."""
    with visit(browser) as seen:
        with plain_server(bundle) as address:
            seen.open(address, threads=None)
            assert seen.page.evaluate("crossOriginIsolated")
            assert seen.threads > 1
            first = seen.ask()
            assert WORD.search(first)
            assert seen.text("offline") == "this page works without a network"
            assert sum(url.endswith(".gguf") for url in seen.asked) == 1
        seen.context.set_offline(True)  # and the server is gone
        seen.page.reload()
        seen.wait()
        assert seen.page.evaluate("crossOriginIsolated")
        assert seen.threads > 1
        assert seen.ask() == first
        assert seen.speed > 0
        other = Visit(seen.context)
        other.open(f"{address}index.html")
        assert other.ask() == first
        assert seen.is_sound(address)
        assert other.is_sound(address)


def test_threads_by_the_headers_of_our_server(browser: Any, bundle: Path) -> None:
    code = "import sys; from pathlib import Path; from cusprun.deploy.static import serve_folder"
    command = [sys.executable, "-c", f"{code}; serve_folder(Path(sys.argv[1]), port=0)", str(bundle)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            found = re.search(r"http://\S+", server.stderr.readline())
            assert found
            with visit(browser, offline_use=False) as seen:
                seen.open(found[0], threads=None)
                assert seen.page.evaluate("crossOriginIsolated")
                assert seen.threads > 1
                assert WORD.search(seen.ask())
                assert seen.speed > 0
                assert seen.is_sound(found[0])
                seen.open(found[0], threads=1)
                assert seen.threads == 1
        finally:
            server.terminate()


def test_the_build_for_safari(browser: Any, bundle: Path, expert: Expert) -> None:
    with plain_server(bundle) as address, visit(browser) as seen:
        seen.context.add_init_script("delete WebAssembly.Suspending; delete WebAssembly.promising")
        seen.open(address)
        assert seen.ask() == expected(expert)
        assert {Path(url).name for url in seen.asked} >= {"compat.wasm", "compat.js"}
        assert not any("wllama.wasm" in url for url in seen.asked)
        assert seen.is_sound(address)


def test_a_model_in_parts(browser: Any, expert: Expert, tmp_path: Path) -> None:
    files = Files()
    gather(expert, files, Wish(), most=60_000)
    folder = write_files(files, tmp_path)
    parts = sorted(path.name for path in (folder / "model").iterdir())
    assert len(parts) > 2
    assert parts[0].endswith(f"-00001-of-{len(parts):05d}.gguf")
    with plain_server(folder) as address, visit(browser) as seen:
        seen.context.add_init_script(WATCH)
        seen.open(address)
        told = [(value, text) for value, text in seen.page.evaluate("told") if text.startswith("Loading the model")]
        assert len(told) > len(parts)
        assert sorted(value for value, _ in told) == [value for value, _ in told]
        assert told[-1][0] == 1
        assert re.fullmatch(r"Loading the model: (\d\.\d MB) of \1", told[-1][1])
        assert seen.ask() == expected(expert)
        assert sum(url.endswith(".gguf") for url in seen.asked) == len(parts)


def test_a_model_without_a_chat_template(browser: Any, tmp_path: Path) -> None:
    expert = make_expert(tmp_path / "expert", chat=False)
    files = Files()
    gather(expert, files, Wish())
    runtime = open_runtime(expert.of("gguf").path, context=512, threads=1)
    prompt = runtime.encode(f"{QUESTION}\n\n")
    wanted = runtime.decode(list(runtime.generate(prompt, Sampling(max_tokens=8))))
    runtime.close()
    with plain_server(write_files(files, tmp_path / "bundle")) as address, visit(browser) as seen:
        seen.open(address)
        assert seen.ask(tokens=8) == wanted


def test_a_talk(browser: Any, bundle: Path) -> None:
    """Stop, a second turn, a full context, a question that is too long, a new talk."""
    with plain_server(bundle) as address, visit(browser) as seen:
        seen.open(address)
        page = seen.page
        first = seen.ask()
        assert "cut at 16 tokens" in page.locator(".answered").last.inner_text()
        second = seen.ask()
        assert page.locator(".turn").count() == 4
        for _ in range(12):
            seen.ask(QUESTION * 3, tokens=64)
            if "forgotten" in page.locator(".answered").last.inner_text():
                break
        else:
            pytest.fail("the context was never full")
        seen.ask("rent " * 2000)
        assert "shorten it" in page.locator(".answered").last.inner_text()
        assert WORD.search(seen.ask())

        page.locator("#new").click()
        assert page.locator(".turn").count() == 0
        assert seen.ask() == first
        assert second != first or seen.ask() == second
        page.locator("#longest").evaluate("field => { field.value = 400 }")
        page.locator("#temperature").evaluate("field => { field.value = 2 }")  # no end is likely at that
        page.evaluate(
            "new MutationObserver(() => document.getElementById('stop').click())"
            ".observe(document.getElementById('talk'), {subtree: true, characterData: true, childList: true})"
        )
        seen.page.locator("#question").fill(QUESTION)
        seen.page.locator("#send").click()
        page.locator(".answered:last-child > .note").wait_for()
        assert "(stopped)" in page.locator(".answered").last.inner_text()
        assert seen.is_sound(address)


def test_what_goes_wrong_is_said_in_words(browser: Any, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    write_files(files_of(bundle), folder)
    model = next((folder / "model").iterdir())
    good = model.read_bytes()
    with plain_server(folder) as address, visit(browser) as seen:

        def problem() -> str:
            seen.page.locator(f"{READY}, {FAILED}").first.wait_for()
            return seen.text("problem-text")

        model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        seen.page.goto(f"{address}?threads=1")
        assert "damaged or of another version" in problem()
        model.write_bytes(good[:-10])
        seen.page.reload()
        assert "damaged or of another version" in problem()
        model.unlink()
        seen.page.reload()
        assert "is not where it should be" in problem()
        assert "HTTP 404" in problem()
        seen.context.set_offline(True)
        seen.page.reload()
        assert "There is no connection" in problem()
        seen.context.set_offline(False)
        model.write_bytes(good)
        seen.page.locator("#retry").click()
        seen.wait()
        assert WORD.search(seen.ask())

        seen.context.add_init_script("WebAssembly.validate = () => false")
        seen.page.reload()
        assert "This browser has no vectors in WebAssembly" in problem()


def test_too_little_memory(browser: Any, bundle: Path, tmp_path: Path) -> None:
    folder = write_files(files_of(bundle), tmp_path)
    settings = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**settings, "context": 2_000_000_000}))
    with plain_server(folder) as address, visit(browser, offline_use=False) as seen:
        seen.page.goto(address)
        seen.page.locator(FAILED).wait_for()
        assert "too little free memory for the model, which has 0.1 MB" in seen.text("problem-text")


def test_a_model_that_llama_cpp_refuses(browser: Any, tmp_path: Path) -> None:
    expert = make_expert(tmp_path / "expert", layout="uniform")
    path = expert.of("gguf").path
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    files = Files()
    gather(expert, files, Wish())
    with plain_server(write_files(files, tmp_path / "bundle")) as address, visit(browser) as seen:
        seen.page.goto(address)
        seen.page.locator(FAILED).wait_for()
        assert "tensor 'blk.1.ffn_up.weight' not found" in seen.text("problem-text")


def test_a_new_version_replaces_the_old(browser: Any, bundle: Path, tmp_path: Path) -> None:
    """Two bundles on one host keep apart; one that is made again takes the place of what was kept of it."""
    site = tmp_path / "site"
    write_files(files_of(bundle), site / "a")
    write_files(files_of(bundle), site / "b")
    kept = """async () => Promise.all((await caches.keys()).map(
        async name => [name, (await (await caches.open(name)).keys()).map(one => one.url)]))"""
    with visit(browser) as seen, plain_server(site) as address:
        seen.open(f"{address}a/")
        first = seen.ask()
        seen.open(f"{address}b/")
        before = dict(seen.page.evaluate(kept))
        assert sorted(before) == ["cusprun /a/", "cusprun /b/"]

        files = Files()
        gather(make_expert(tmp_path / "other", name="another", seed=3), files, Wish())
        write_files(files, site / "a")
        seen.page.goto(f"{address}a/?threads=1")  # the old page; a browser looks for a new one soon after, here at once
        assert seen.page.title() == "pico-en-legal-qa"
        seen.page.evaluate("navigator.serviceWorker.getRegistration().then(found => found.update())")
        for _ in range(50):
            if seen.page.title() == "another":
                break
            seen.page.wait_for_timeout(200)
            seen.page.goto(f"{address}a/?threads=1")
        seen.wait()
        assert seen.page.title() == "another"
        assert seen.ask() != first
        after = dict(seen.page.evaluate(kept))
        assert after["cusprun /b/"] == before["cusprun /b/"]
        assert len(after["cusprun /a/"]) == len(before["cusprun /a/"])
        assert not set(after["cusprun /a/"]) & {url for url in before["cusprun /a/"] if ".gguf" in url}


def test_it_can_be_read_by_all(browser: Any, bundle: Path) -> None:
    """Every state of the page as wide as a desktop and a small phone, light and dark; then by keys alone."""
    from axe_playwright_python.sync_playwright import Axe

    with plain_server(bundle) as address, visit(browser) as seen:
        page = seen.page

        def check() -> None:
            for width in (1280, 360):
                page.set_viewport_size({"width": width, "height": 740})
                assert page.evaluate("document.documentElement.scrollWidth") == width
                for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 28)")):
                    page.emulate_media(color_scheme=scheme)
                    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
                    found = Axe().run(page).response["violations"]
                    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == []

        seen.open(address)
        check()
        seen.ask("Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2)
        check()
        seen.ask("rent " * 40)
        last, edge = page.locator(".answered").last.bounding_box(), page.locator("footer").bounding_box()
        assert last["y"] + last["height"] <= edge["y"], "the end of the answer is behind the foot of the page"
        page.locator("summary").click()
        page.evaluate("document.getElementById('problem').hidden = false")
        page.locator("#problem-text").evaluate("line => { line.textContent = 'There is no connection.' }")
        check()
        page.locator("#question").focus()
        page.keyboard.type("rent")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "send"
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.id") == "new"
        page.keyboard.press("Enter")
        assert page.locator(".turn").count() == 0
        assert seen.said == []


def test_names_are_text(browser: Any, tmp_path: Path) -> None:
    name = "</title><script>document.title='taken'</script>\"'&"
    files = Files()
    gather(make_expert(tmp_path / "expert", name=name), files, Wish())
    with plain_server(write_files(files, tmp_path / "bundle")) as address, visit(browser) as seen:
        seen.open(address)
        assert seen.page.title() == name
        assert seen.text("about") != ""
        assert seen.page.locator("h1").text_content() == name
        seen.ask()
        assert seen.page.locator(".answered h2").text_content() == name
        assert seen.is_sound(address)


def files_of(folder: Path) -> Files:
    files = Files()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files.add(path.relative_to(folder).as_posix(), path)
    return files


@pytest.mark.slow
def test_a_real_model_speaks_english(browser: Any, tmp_path: Path) -> None:
    from cusprun.dense import embedded_gguf

    expert = make_expert(tmp_path / "expert", name="smollm2-135m-instruct", gguf=embedded_gguf())
    files = Files()
    gather(expert, files, Wish())
    with visit(browser) as seen:
        seen.context.set_default_timeout(300_000)
        with plain_server(write_files(files, tmp_path / "bundle")) as address:
            seen.open(address, threads=2)
            answer = seen.ask("What is the capital of France?", tokens=24)
            assert "Paris" in answer
            assert seen.speed > 0
        seen.context.set_offline(True)
        seen.page.reload()
        seen.wait()
        assert seen.ask("What is the capital of France?", tokens=24) == answer
        assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["chat_template"]
