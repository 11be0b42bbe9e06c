"""The sample projects held against what is here: parsers, compilers, and what of them runs without a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tree_sitter
import tree_sitter_kotlin

from cusprun.deploy.expert import Expert
from cusprun.deploy.targets.phone_names import LONGEST, kotlin, names_of, typescript
from cusprun.deploy.targets.phone_notes import VERSIONS
from tests.deploy.phone_bundle import NAME, make_expert, write_bundle

HOSTILE = [
    "x",
    "class",
    "135m",
    "SmolLM2-135M.Instruct_en",
    "../../etc/passwd",
    "$(reboot) `id` ${HOME} $x",
    "'; rm -rf / #",
    'a"b\\c"""d</string><!-- ]]> & %1$s',
    "@string/ask",
    "{{ 7*7 }}{% raw %}",
    "line\nbreak\ttab\f\x00\u202eend",
    "法律の質問",
    "🙂",
    "  ",
    "-",
    "a" * 300,
]
NODE, JAVA = shutil.which("node"), shutil.which("java")
PACKAGES = {
    "llama.rn": "llama_rn", "react-native": "react_native", "react": "react", "@types/react": "types_react",
    "typescript": "typescript", "expo": "expo", "expo-asset": "expo_asset", "expo-file-system": "expo_file_system",
}  # fmt: skip

# onnxruntime-genai's Java classes as its published sources declare them, as far as Expert.kt calls them.
GENAI = {
    "class GenAIException extends Exception": "",
    "final class Sequences implements AutoCloseable": "public void close() {}",
    "final class Model implements AutoCloseable": """
        public Model(String modelPath) throws GenAIException {}
        public void close() {}""",
    "class TokenizerStream implements AutoCloseable": """
        public String decode(int token) throws GenAIException { return ""; }
        public void close() {}""",
    "class Tokenizer implements AutoCloseable": """
        public Tokenizer(Model model) throws GenAIException {}
        public Sequences encode(String string) throws GenAIException { return null; }
        public TokenizerStream createStream() throws GenAIException { return null; }
        public void close() {}""",
    "final class GeneratorParams implements AutoCloseable": """
        public GeneratorParams(Model model) throws GenAIException {}
        public void setSearchOption(String optionName, double value) throws GenAIException {}
        public void setSearchOption(String optionName, boolean value) throws GenAIException {}
        public void close() {}""",
    "final class Generator implements AutoCloseable, Iterable<Integer>": """
        public Generator(Model model, GeneratorParams generatorParams) throws GenAIException {}
        public java.util.Iterator<Integer> iterator() { return null; }
        public boolean isDone() { return true; }
        public void appendTokenSequences(Sequences sequences) throws GenAIException {}
        public void generateNextToken() throws GenAIException {}
        public int getLastTokenInSequence(long sequenceIndex) throws GenAIException { return 0; }
        public void close() {}""",
}
INSTALL = """
import {package}.installModel
import java.io.File

fun main(folders: Array<String>) {{
    print(installModel(File(folders[1])) {{ name -> File(folders[0], name).inputStream() }}.name)
}}
"""

# What model.ts asks of Expo, on a desktop's files: the app's documents are in argv[2], its assets in argv[3].
EXPO = {
    "expo-file-system": """
import fs from 'node:fs';
import path from 'node:path';
class Entry {
  constructor(...uris) { this.uri = path.join(...uris.map((one) => one.uri ?? one)); }
  get name() { return path.basename(this.uri); }
  get exists() { return fs.existsSync(this.uri); }
  delete() { fs.rmSync(this.uri, { recursive: true }); }
}
export class File extends Entry {
  get size() { return fs.statSync(this.uri).size; }
  async copy(to) { fs.copyFileSync(this.uri, to.uri); }
}
export class Directory extends Entry {
  create() { fs.mkdirSync(this.uri, { recursive: true }); }
  list() {
    const found = fs.readdirSync(this.uri, { withFileTypes: true });
    return found.map((one) => new (one.isDirectory() ? Directory : File)(this.uri, one.name));
  }
}
export const Paths = { document: new Directory(process.argv[2]) };
""",
    "expo-asset": """
import fs from 'node:fs';
import path from 'node:path';
const fetch = (name) => {
  const localUri = path.join(process.argv[3], `cached-${path.basename(name)}`);
  fs.copyFileSync(path.join(process.argv[3], path.basename(name)), localUri);
  return { localUri };
};
export const Asset = { fromModule: (name) => ({ downloadAsync: async () => fetch(name) }) };
""",
}
TYPES = (": { module: number; name: string; bytes: number }[]", ": Promise<string>")
PLACE = """
globalThis.require = (name) => name;
const { placeModel } = await import('./model.mjs');
process.stdout.write(await placeModel());
"""


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Expert:
    return make_expert(tmp_path_factory.mktemp("expert"))


def built_anew(expert: Expert, folder: Path) -> Expert:
    """The expert with other weights in files of the same names and sizes."""
    artifacts = []
    for one in expert.artifacts:
        path = folder / one.path.name
        (shutil.copytree if one.path.is_dir() else shutil.copyfile)(one.path, path)
        weights = path / "model.onnx.data" if path.is_dir() else path
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        artifacts.append(replace(one, path=path))
    return replace(expert, artifacts=tuple(artifacts))


@pytest.fixture
def bundle(expert: Expert, tmp_path: Path) -> Path:
    write_bundle(expert, tmp_path / "bundle")
    return tmp_path / "bundle"


def mistakes(source: bytes) -> list[str]:
    """The lines of Kotlin that do not parse."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_kotlin.language()))

    def broken(node: tree_sitter.Node) -> Iterator[str]:
        if node.is_error or node.is_missing:
            yield f"line {node.start_point.row + 1}"
        for child in node.children:
            yield from broken(child)

    return list(broken(parser.parse(source).root_node))


@pytest.mark.parametrize("name", [NAME, *HOSTILE])
def test_everything_parses_whatever_the_experts_name(expert: Expert, tmp_path: Path, name: str) -> None:
    write_bundle(expert, tmp_path, name=name)
    names = names_of(name)
    sources = sorted((tmp_path / "android").rglob("*.kt*"))
    assert len(sources) == 6
    for path in sources:
        assert mistakes(path.read_bytes()) == [], path
    main = tmp_path / "android" / "app" / "src" / "main"
    assert {path.parent for path in main.rglob("*.kt")} == {main / "java" / names.package_path}
    assert f"package {names.package}\n" in (main / "java" / names.package_path / "Expert.kt").read_text()
    strings = ElementTree.parse(main / "res" / "values" / "strings.xml").getroot()
    label = strings.findtext("string[@name='app_name']")
    assert label is not None
    assert re.sub(r"\\(.)", r"\1", label) == names.label
    assert not re.search(r"""(?<!\\)['"@]""", label)
    app = json.loads((tmp_path / "react-native" / "app.json").read_text())["expo"]
    assert app["name"] == names.label
    assert json.loads((tmp_path / "react-native" / "package.json").read_text())["name"] == app["slug"] == names.slug
    subprocess.run(["sh", "-n", tmp_path / "termux" / "run.sh"], check=True)
    for path in tmp_path.rglob("*"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+", path.name)


def test_the_manifest_asks_for_no_permission(bundle: Path) -> None:
    manifest = ElementTree.parse(bundle / "android" / "app" / "src" / "main" / "AndroidManifest.xml").getroot()
    tools, android = "{http://schemas.android.com/tools}", "{http://schemas.android.com/apk/res/android}"
    asked = {entry.get(f"{android}name"): entry.get(f"{tools}node") for entry in manifest.iter("uses-permission")}
    assert asked == {"android.permission.INTERNET": "remove", "android.permission.ACCESS_NETWORK_STATE": "remove"}
    (provider,) = manifest.iter("provider")
    assert provider.get(f"{tools}node") == "remove"


@pytest.mark.parametrize(("old", "new"), [("fun stop() {", "fun stop( {"), ('"max_length"', '"max_length')])
def test_kotlin_that_is_broken_is_found(bundle: Path, old: str, new: str) -> None:
    (path,) = bundle.rglob("Expert.kt")
    text = path.read_text()
    assert old in text
    assert mistakes(text.replace(old, new, 1).encode())


def test_no_two_names_share_a_package() -> None:
    names = [
        *HOSTILE,
        NAME,
        "Pico-Legal",
        "pico.legal",
        "pico_legal",
        "expert-x",
        "expert--x",
        "a" * 299,
        "法律",
        "質問",
    ]
    found = [names_of(name) for name in names]
    for one in ("package", "bundle_id", "slug"):
        assert len({getattr(each, one) for each in found}) == len(names)
    for each in found:
        assert re.fullmatch(r"org\.cusprun\.[a-z][a-z0-9]*_[a-z0-9_]+", each.package)  # an underscore: no keyword
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", each.slug)
        assert len(each.slug) <= LONGEST
        assert each.label.isprintable()
        assert each.label


def test_literals_read_back() -> None:
    for name in HOSTILE:
        assert json.loads(typescript(name)) == name
        assert json.loads(kotlin(name).replace("\\$", "$")) == name
        assert not re.search(r"(?<!\\)\$", kotlin(name))


def run_sh(bundle: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """termux/run.sh where there is neither llama.cpp nor pkg, from another folder."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("sh", "dirname", "sha256sum"):
        found = shutil.which(tool)
        assert found
        if not (tools / tool).exists():
            (tools / tool).symlink_to(found)
    script = ["sh", str(bundle / "termux" / "run.sh"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env={"PATH": str(tools)}, timeout=30)


def test_the_termux_script_checks_the_model_first(bundle: Path, tmp_path: Path) -> None:
    unknown = run_sh(bundle, tmp_path, "dance")
    assert (unknown.returncode, unknown.stderr) == (2, "unknown: dance; write chat, or serve [PORT]\n")
    missing = run_sh(bundle, tmp_path)
    assert missing.returncode == 1
    assert missing.stderr == "llama-cli is missing and this is not Termux: install llama.cpp\n"
    (gguf,) = (bundle / "gguf").iterdir()
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"?")
    damaged = run_sh(bundle, tmp_path, "serve")
    assert damaged.returncode == 1
    assert "not the one that was shipped" in damaged.stderr


def test_the_termux_script_passes_shellcheck(expert: Expert, tmp_path: Path) -> None:
    write_bundle(expert, tmp_path, name="'; $(x)")
    script = tmp_path / "termux" / "run.sh"
    command = [Path(sys.executable).with_name("shellcheck"), script]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
    script.write_text(script.read_text().replace('"$(dirname "$0")/.."', "$(dirname $0)/.."))
    assert "SC2046" in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_the_model_is_brought_into_the_app_and_checked(expert: Expert, tmp_path: Path) -> None:
    write_bundle(expert, tmp_path, most=60_000)
    command = ["node", tmp_path / "react-native" / "bring-model.mjs"]
    subprocess.run(command, check=True)
    parts = sorted((tmp_path / "gguf").iterdir())
    brought = sorted((tmp_path / "react-native" / "assets").iterdir())
    assert [path.read_bytes() for path in brought] == [path.read_bytes() for path in parts]
    model = (tmp_path / "react-native" / "model.ts").read_text()
    assert re.findall(r"require\('./assets/(\S+)'\)", model) == [path.name for path in brought]
    parts[1].write_bytes(parts[1].read_bytes()[:-1] + b"?")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"../gguf/{parts[1].name} is damaged" in refused.stderr


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_an_update_of_the_react_native_app_brings_its_own_model(expert: Expert, tmp_path: Path) -> None:
    """model.ts without its types, on stand-ins for Expo."""
    (tmp_path / "built").mkdir()
    documents = tmp_path / "documents"
    for kept in (NAME, f"{NAME}-notes", f"other-{'0' * 12}"):
        (documents / kept).mkdir(parents=True)
    (documents / f"{NAME}-{'0' * 12}").write_text("a file of the app's")
    others = sorted(documents.iterdir())
    (documents / f"{NAME}-{'f' * 12}").mkdir()

    def start(name: str, which: Expert) -> tuple[Path, dict[str, bytes]]:
        """The folder of the model after a start of the app, and what was shipped."""
        project = tmp_path / name / "react-native"
        if not project.is_dir():
            write_bundle(which, tmp_path / name, most=60_000)
            subprocess.run(["node", project / "bring-model.mjs"], check=True)
            model = (project / "model.ts").read_text()
            for declared in TYPES:
                assert model.count(declared) == 1
                model = model.replace(declared, "")
            (project / "model.mjs").write_text(model)
            (project / "place.mjs").write_text(PLACE)
            for package, source in EXPO.items():
                (project / "node_modules" / package).mkdir(parents=True)
                (project / "node_modules" / package / "index.mjs").write_text(source)
                (project / "node_modules" / package / "package.json").write_text('{"exports": "./index.mjs"}')
        command = ["node", project / "place.mjs", documents, project / "assets"]
        placed = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        shipped = {path.name: path.read_bytes() for path in (tmp_path / name / "gguf").iterdir()}
        assert placed.name == min(shipped)
        assert {path.name: path.read_bytes() for path in placed.parent.iterdir()} == shipped
        return placed.parent, shipped

    first, before = start("first", expert)
    assert sorted(documents.iterdir()) == sorted([*others, first])
    untouched = first.stat().st_mtime_ns
    assert start("first", expert)[0] == first
    assert first.stat().st_mtime_ns == untouched
    second, after = start("second", built_anew(expert, tmp_path / "built"))
    assert {name: len(content) for name, content in before.items()} == {name: len(after[name]) for name in after}
    assert before != after
    assert sorted(documents.iterdir()) == sorted([*others, second])


@pytest.mark.slow
@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_typescript_compiles_against_the_packages_own_types(bundle: Path, tmp_path: Path) -> None:
    """Packages are unpacked without what they need themselves: their declarations are what is wanted."""
    project = bundle / "react-native"
    wanted = [f"{package}@{VERSIONS[version]}" for package, version in PACKAGES.items()]
    packed = ["npm", "pack", "--json", "--pack-destination", str(tmp_path), *wanted, "csstype@3"]
    told = json.loads(subprocess.run(packed, capture_output=True, text=True, check=True, timeout=300).stdout)
    for entry in told if isinstance(told, list) else told.values():
        folder = project / "node_modules" / entry["name"]
        folder.mkdir(parents=True)
        archive = tmp_path / entry["filename"].replace("@", "").replace("/", "-")
        subprocess.run(["tar", "xzf", archive, "-C", folder, "--strip-components=1"], check=True)

    def compile() -> str:
        command = ["node", "node_modules/typescript/bin/tsc", "--noEmit"]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300).stdout

    assert compile() == ""
    wrong = {"App.tsx": ("n_ctx:", "n_context:"), "model.ts": ("asset.localUri", "asset.address")}
    for file, (old, new) in wrong.items():
        path = project / file
        path.write_text(path.read_text().replace(old, new))
    found = compile()
    assert "'n_context' does not exist in type 'ContextParams'" in found
    assert "Property 'address' does not exist on type 'Asset'" in found


@pytest.mark.slow
@pytest.mark.skipif(JAVA is None, reason="needs Java")
def test_kotlin_compiles_and_the_model_is_installed_whole(expert: Expert, bundle: Path, tmp_path: Path) -> None:
    """All of the app but its one activity, by the Kotlin compiler of the project's version; the copying runs."""
    packed = ["npm", "pack", "--silent", "--pack-destination", str(tmp_path), f"kotlin-compiler@{VERSIONS['kotlin']}"]
    subprocess.run(packed, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("kotlin-compiler-*.tgz")
    subprocess.run(["tar", "xzf", archive, "-C", tmp_path], check=True)
    java = tmp_path / "java"
    genai = java / "ai" / "onnxruntime" / "genai"
    genai.mkdir(parents=True)
    for declared, members in GENAI.items():
        found = re.search(r"class (\w+)", declared)
        assert found
        text = f"package ai.onnxruntime.genai;\npublic {declared} {{{members}\n}}\n"
        (genai / f"{found[1]}.java").write_text(text)
    (tmp_path / "Install.kt").write_text(INSTALL.format(package=names_of(NAME).package))
    jar, files = tmp_path / "app.jar", tmp_path / "files"

    def compile(*sources: Path) -> None:
        command = ["bash", tmp_path / "package" / "bin" / "kotlinc", *sources, "-include-runtime", "-d", jar]
        compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (compiled.returncode, compiled.stderr) == (0, "")

    def install(bundle: Path) -> subprocess.CompletedProcess[str]:
        run = ["java", "-cp", jar, "InstallKt", bundle / "onnx", files]
        return subprocess.run(run, capture_output=True, text=True, timeout=60)

    def installed(bundle: Path) -> Path:
        """The folder of the model after a start of the app; it alone is there, with what was shipped."""
        done = install(bundle)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in files.iterdir() if path.name != f"{NAME}-notes"] == [done.stdout]
        shipped = {path.name: path.read_bytes() for path in (bundle / "onnx" / NAME).iterdir()}
        assert {path.name: path.read_bytes() for path in (files / done.stdout).iterdir()} == shipped
        return files / done.stdout

    compile(*(next(bundle.rglob(name)) for name in ("Expert.kt", "ModelFiles.kt")), tmp_path / "Install.kt", java)
    (files / f"{NAME}-notes").mkdir(parents=True)
    (files / f"{NAME}-{'f' * 12}").mkdir()
    first = installed(bundle)
    untouched = first.stat().st_mtime_ns
    assert installed(bundle) == first
    assert first.stat().st_mtime_ns == untouched
    (first / "model.onnx").unlink()
    content = (bundle / "onnx" / NAME / "model.onnx").read_bytes()
    (bundle / "onnx" / NAME / "model.onnx").write_bytes(content[:-1] + b"?")
    refused = install(bundle)
    assert refused.returncode == 1
    assert "model.onnx is damaged" in refused.stderr
    assert not list(first.glob("model.onnx*[!a]"))

    (tmp_path / "built").mkdir()
    update = tmp_path / "update"
    write_bundle(built_anew(expert, tmp_path / "built"), update)
    compile(next(update.rglob("ModelFiles.kt")), tmp_path / "Install.kt")
    (bundle / "onnx" / NAME / "model.onnx").write_bytes(content)
    sizes = [{path.name: path.stat().st_size for path in (one / "onnx" / NAME).iterdir()} for one in (bundle, update)]
    assert sizes[0] == sizes[1]
    assert installed(update) != first
