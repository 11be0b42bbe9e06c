"""Bundles for a laptop and a server out of a real build: what they hold, that they run, and come out the same."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cusprun.cli_ship import ship as command
from cusprun.deploy.expert import Expert
from cusprun.deploy.manifest import MANIFEST, SIGNATURE
from cusprun.deploy.names import LONGEST
from cusprun.deploy.ship import ship
from cusprun.deploy.signing import make_key
from cusprun.deploy.targets import Wish
from cusprun.deploy.verify import unpack, verify
from cusprun.errors import InvalidRequest
from cusprun.files import sha256_file
from cusprun.runtimes import Message, Sampling, open_runtime
from tests.deploy.test_ollama import parse_modelfile, run_go

GGUF = "pico-legal-q8_0.gguf"
EVERY = {
    "README.md", "MODEL_CARD.md", "ATTRIBUTION.md", "LICENSES/Apache-2.0.txt", "LICENSES/MIT.txt", "bom.cdx.json",
    "expert.json", MANIFEST,
}  # fmt: skip


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "cusprun.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory, pico_expert: Path) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "pico"
    ship(pico_expert, "laptop", out)
    return out


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory, pico_expert: Path) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "pico-onnx"
    ship(pico_expert, "laptop", out, archive="none", wish=Wish(format="onnx"))
    return out


def test_the_scenario_in_words() -> None:
    def purpose(**scenario: str) -> str:
        return Expert(Path(), "x", {"scenario": scenario}, None, Path(), ()).purpose

    assert purpose(language="en", domain="legal", task="qa", name="x") == "English, legal, question answering"
    assert purpose(domain="my own") == "my own"
    assert Expert(Path(), "x", {}, None, Path(), ()).purpose == ""


def test_what_a_laptop_is_given(laptop: Path, pico_expert: Path) -> None:
    files = names(laptop)
    assert EVERY | {GGUF, "Modelfile", "start.sh", "start.bat"} <= files
    assert SIGNATURE not in files
    assert (laptop / GGUF).read_bytes() == (pico_expert / "gguf" / GGUF).read_bytes()
    assert os.access(laptop / "start.sh", os.X_OK)
    found = verify(laptop)
    assert (found.signature, found.files) == ("none", len(files) - 1)
    assert verify(laptop.with_name("pico.zip")) == found
    readme = (laptop / "README.md").read_text()
    assert "A small language model, cut out of pico-llama, for a laptop. It runs on the device" in readme
    for told in ("./start.sh", "ollama create pico-legal -f Modelfile", "cusprun-edge chat .", "`deci`",
                 "--layout uniform", "is not signed", "## Not proven"):  # fmt: skip
        assert told in readme, told


# Runs before anything else is imported: another day, another time zone, ids that are never the same.
ELSEWHEN = """
import datetime, os, sys, time
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=400)
datetime.datetime, before = Later, time.time
time.time = lambda: before() + 400 * 86400
os.umask(0o077)
from pathlib import Path
from cusprun.deploy.ship import ship
print(ship(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])).archive_sha256)
"""


@pytest.mark.parametrize(("target", "suffix"), [("laptop", "zip"), ("server", "tar.zst")])
def test_made_on_different_days_they_have_the_same_sha256(
    tmp_path: Path, pico_expert: Path, target: str, suffix: str
) -> None:
    here = ship(pico_expert, target, tmp_path / f"here.{suffix}")
    copy = tmp_path / "some where" / "else"
    copy.parent.mkdir()
    shutil.copytree(pico_expert, copy, ignore=shutil.ignore_patterns(".stages"))
    for path in copy.rglob("*"):
        os.utime(path, (10**9, 10**9))
        path.chmod(0o700)
    elsewhere = copy.parent / f"there.{suffix}"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LANG": "C", "USER": "somebody"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHEN, str(copy), target, str(elsewhere)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here.archive_sha256 == sha256_file(elsewhere)
    assert elsewhere.read_bytes() == (tmp_path / f"here.{suffix}").read_bytes()


def test_a_signed_bundle_differs_in_its_signature_alone(tmp_path: Path, pico_expert: Path) -> None:
    key, public = make_key(tmp_path / "key")
    first, second = (ship(pico_expert, "laptop", tmp_path / name, archive="none", sign_key=key) for name in "ab")
    assert first.digest == second.digest
    differ = [name for name in names(tmp_path / "a")
              if (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()]  # fmt: skip
    assert differ == [SIGNATURE]
    assert verify(tmp_path / "b", public).signer == first.signer
    assert first.signer is not None
    assert first.signer in (tmp_path / "a" / "README.md").read_text()


def test_nothing_tells_where_or_by_whom_it_was_made(laptop: Path, onnx: Path, pico_expert: Path) -> None:
    assert str(pico_expert.parent) in (pico_expert / "expert.json").read_text()  # what must not get out
    strange = [str(pico_expert.parent), str(Path.home()), "contracts.txt", "/tmp"]
    strange += [name for name in (getpass.getuser(), os.uname().nodename) if len(name) > 4]  # else by chance
    for bundle in (laptop, onnx):
        for path in (path for path in bundle.rglob("*") if path.is_file()):
            content = path.read_bytes()
            assert not [word for word in strange if word.encode() in content], path


def test_the_card_is_the_hubs_and_its_figures_are_the_reports(laptop: Path, onnx: Path, pico_expert: Path) -> None:
    from huggingface_hub import ModelCard

    report = json.loads((pico_expert / "report" / "report.json").read_text())
    card = ModelCard.load(laptop / "MODEL_CARD.md", ignore_metadata_errors=False)
    assert card.data.license == "apache-2.0"
    assert {"cusprun", "gguf"} <= set(card.data.tags)
    results = {(one.dataset_config, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results == {
        (text, key): pair["expert"][key]
        for text, pair in report["quality"]["corpora"].items()
        for key in ("bits_per_byte", "perplexity")
    }
    decode = report["speed"]["expert"]["decode_tps"]["mean"]
    assert f"{decode:,.0f}" in card.text
    other = ModelCard.load(onnx / "MODEL_CARD.md")  # int4 was not measured
    assert other.data.eval_results is None
    assert "Nothing was measured in the type that is shipped" in other.text
    assert not re.search(r"tokens/s|perplexity", other.text)
    assert json.loads((onnx / "expert.json").read_text())["figures"] is None


def test_the_bill_of_materials(laptop: Path, pico_expert: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (laptop / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"approach"', '"approach_"')) is not None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "pico-legal")
    (base,) = model["pedigree"]["ancestors"]
    assert (base["name"], base["licenses"]) == ("pico-llama", [{"license": {"id": "Apache-2.0"}}])
    assert base["hashes"][0]["content"] == json.loads((pico_expert / "expert.json").read_text())["base"]["sha256"]
    parts = {part["name"]: part for part in bom["components"]}
    assert parts[GGUF]["hashes"] == [{"alg": "SHA-256", "content": sha256_file(laptop / GGUF)}]
    texts = {name for name, part in parts.items() if part["type"] == "data"}
    assert texts
    assert {ref["ref"] for ref in model["modelCard"]["modelParameters"]["datasets"]} == {f"text:{n}" for n in texts}
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert "timestamp" not in bom["metadata"]
    attribution = (laptop / "ATTRIBUTION.md").read_text()
    for name in texts:
        assert f"- {name} (" in attribution
        assert parts[name]["copyright"] in attribution
    for part in parts.values():
        for licence in part.get("licenses", ()):
            known = licence.get("license", {}).get("id")
            assert known is None or f"LICENSES/{known}.txt" in names(laptop)


def test_a_licence_that_is_not_known_is_said(tmp_path: Path, pico_expert: Path) -> None:
    copy = tmp_path / "expert"
    shutil.copytree(pico_expert, copy)
    card = json.loads((copy / "expert.json").read_text())
    for licence, told in (
        (None, "is not known to the maker"),
        ("llama3.2", "As pico-llama, from which it was made: llama"),
    ):
        card["base"]["licence"] = licence
        del card["base"]["id"]
        card["base"]["id"] = r"C:\Users\me\pico-llama"
        (copy / "expert.json").write_text(json.dumps(card))
        out = tmp_path / str(licence)
        ship(copy, "laptop", out, archive="none")
        text = (out / "MODEL_CARD.md").read_text()
        assert told in text
        front = yaml.safe_load(text.split("---")[1])
        assert (front.get("license"), front.get("license_name")) == (licence and "other", licence)
        assert "Users" not in "".join(path.read_text(errors="replace") for path in out.glob("*.*"))


def test_a_base_model_is_what_the_build_knew_wherever_it_is_shipped(
    tmp_path: Path, pico_expert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder reads like a hub id, and a folder may lie where it is shipped that is called as a hub id is."""
    copy = tmp_path / "expert"
    shutil.copytree(pico_expert, copy)
    card = json.loads((copy / "expert.json").read_text())
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base, hub_id in (("models/mine", None), ("owner/model", "owner/model")):
        card["base"] |= {"id": base, "hub_id": hub_id}
        (copy / "expert.json").write_text(json.dumps(card))
        out = tmp_path / base.partition("/")[2]
        ship(copy, "laptop", out, archive="none")
        front = yaml.safe_load((out / "MODEL_CARD.md").read_text().split("---")[1])
        assert front.get("base_model") == hub_id
        shipped = json.loads((out / "expert.json").read_text())["base"]
        assert (shipped["id"], shipped["hub_id"]) == (hub_id or "mine", hub_id)
    card["base"]["hub_id"] = "../../x"
    (copy / "expert.json").write_text(json.dumps(card))
    with pytest.raises(InvalidRequest, match=r"hub_id '\.\./\.\./x'"):
        ship(copy, "laptop", tmp_path / "no", archive="none")


def test_the_modelfile_parses_and_asks_as_the_model_was_taught(laptop: Path) -> None:
    rows = parse_modelfile((laptop / "Modelfile").read_text())
    commands = dict(rows)
    assert (laptop / commands["from"]).is_file()
    runtime = open_runtime(laptop / GGUF, threads=1)
    talk = [Message("user", "Who pays?"), Message("assistant", "The tenant."), Message("user", "When?")]
    assert run_go(commands["template"], talk) == runtime.chat_prompt(talk)
    assert commands["stop"] == "<|im_end|>"
    assert int(commands["num_ctx"]) == 512  # what the model was trained for


def test_the_bundle_answers_as_the_expert_does(laptop: Path, pico_expert: Path) -> None:
    from cusprun.deploy.chat import find_artifact

    assert find_artifact(laptop) == laptop / GGUF
    said = []
    for path in (find_artifact(laptop), find_artifact(pico_expert)):
        runtime = open_runtime(path, threads=1)
        tokens = runtime.encode(runtime.chat_prompt([Message("user", "Who pays?")]), special=True)
        said.append(list(runtime.generate(tokens, Sampling(max_tokens=12))))
    assert said[0] == said[1]
    assert said[0]


# Python without the packages' folder, to which the ones that a receiver installs are added, and not cusprun.
ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import cusprun
except ImportError:
    pass
else:
    raise SystemExit("cusprun is here")
import onnxruntime_genai as og
model = og.Model(sys.argv[2])
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, parameters)
tokens = tokenizer.encode(sys.argv[3])
generator.append_tokens(tokens)
said = []
while not generator.is_done() and len(said) < 12:
    generator.generate_next_token()
    said.append(int(generator.get_next_tokens()[0]))
print(said)
"""


def test_the_onnx_folder_runs_under_onnxruntime_genai_without_cusprun(
    tmp_path: Path, pico_expert: Path, onnx: Path
) -> None:
    assert "onnx/genai_config.json" in names(onnx)
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for path in folder.iterdir():
            if re.match(r"(onnxruntime|numpy|packaging|flatbuffers|google|protobuf)", path.name):
                (packages / path.name).symlink_to(path)
    place = tmp_path / "place"
    shutil.move(str(unpacked(tmp_path, pico_expert) / "onnx"), place)
    runtime = open_runtime(place, threads=1)
    prompt = runtime.chat_prompt([Message("user", "Who pays the rent?")])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, str(packages), str(place), prompt],
        capture_output=True, text=True, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = list(runtime.generate(runtime.encode(prompt, special=True), Sampling(max_tokens=12)))
    assert json.loads(done.stdout) == wanted
    assert wanted


def unpacked(tmp_path: Path, expert: Path) -> Path:
    archive = ship(expert, "laptop", tmp_path / "onnx.zip", wish=Wish(format="onnx")).archive
    assert archive is not None
    unpack(archive, tmp_path / "unpacked")
    return tmp_path / "unpacked"


def test_uniform_is_the_same_model_in_an_architecture_that_all_open(tmp_path: Path, pico_expert: Path) -> None:
    from cusprun.runtimes.gguf_header import load_metadata

    out = tmp_path / "uniform"
    ship(pico_expert, "laptop", out, archive="none", layout="uniform")
    (path,) = out.glob("*.gguf")
    info, before = load_metadata(path), load_metadata(pico_expert / "gguf" / GGUF)
    assert (before.architecture, info.architecture) == ("deci", "llama")
    assert len(set(info.layers)) == 1
    readme = (out / "README.md").read_text()
    assert "not known to open" not in readme
    assert "Ollama" in readme
    runtimes = [open_runtime(model, threads=1) for model in (path, pico_expert / "model")]
    logits = [runtime.prefill(runtime.encode("The tenant shall pay the rent", special=True)) for runtime in runtimes]
    assert abs(logits[0] - logits[1]).max() < 0.05 * abs(logits[1]).max()  # rounded to q8_0, in other blocks
    assert json.loads((out / "expert.json").read_text())["figures"] is None
    verify(out)
    with pytest.raises(InvalidRequest, match="is for GGUF"):
        ship(pico_expert, "laptop", tmp_path / "no", layout="uniform", wish=Wish(format="onnx"))


def test_scripts_are_scripts(laptop: Path, tmp_path: Path, pico_expert: Path) -> None:
    server = tmp_path / "server"
    ship(pico_expert, "server", server, archive="none")
    bare = {"PATH": "/usr/bin:/bin"}
    for path in (laptop / "start.sh", server / "start.sh", server / "health.sh"):
        subprocess.run(["sh", "-n", str(path)], check=True)
    for path in (laptop / "start.sh", server / "start.sh"):
        done = subprocess.run([str(path)], capture_output=True, text=True, env=bare, cwd="/")
        assert (done.returncode, "llama-server is missing" in done.stderr) == (1, True)
        assert GGUF in path.read_text()
    done = subprocess.run([str(server / "start.sh")], capture_output=True, text=True, env={**bare, "HOST": "0.0.0.0"})
    assert (done.returncode, "LLAMA_API_KEY" in done.stderr) == (2, True)
    batch = (laptop / "start.bat").read_bytes()
    assert batch.count(b"\n") == batch.count(b"\r\n") > 3
    dockerfile = (server / "Dockerfile").read_text()
    assert all((server / name).is_file() for name in re.findall(r"[\w.-]+\.(?:gguf|sh)\b", dockerfile))
    unit = (server / "pico-legal.service").read_text()
    assert "ExecStart=/opt/pico-legal/start.sh" in unit


def test_what_makes_no_sense(tmp_path: Path, pico_expert: Path) -> None:
    out = tmp_path / "out"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"target": "toaster"}, "write one of laptop, phone, browser, server"),
        ({"archive": "rar"}, r"write one of tar\.zst, zip, none"),
        ({"layout": "wide"}, "uniform, or leave it out"),
        ({"wish": Wish(quant="q2_k")}, "has gguf q8_0, onnx int4 and not gguf q2_k: build it with"),
        ({"target": "server", "wish": Wish(format="onnx")}, "--target server takes a GGUF"),
        ({"out": tmp_path / "x.zip", "archive": "tar.zst"}, "two kinds of archive"),
        ({"out": tmp_path}, "exists; choose another name"),
        ({"sign_key": tmp_path / "absent"}, "make a key with cusprun-edge keygen"),
        ({"folder": tmp_path}, "is no expert"),
    ]
    for values, message in wrong:
        given: dict[str, Any] = {"folder": pico_expert, "target": "laptop", "out": out, **values}
        with pytest.raises(InvalidRequest, match=message):
            ship(given.pop("folder"), given.pop("target"), given.pop("out"), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../evil", "a b", "$(reboot)", "CON", 'a"b', "a\nb", ""])
def test_names_that_a_script_could_misread(tmp_path: Path, pico_expert: Path, name: str) -> None:
    copy = tmp_path / "expert"
    shutil.copytree(pico_expert, copy)
    card = json.loads((copy / "expert.json").read_text())
    (copy / "expert.json").write_text(json.dumps({**card, "name": name}))
    with pytest.raises(InvalidRequest, match="build the expert with --name"):
        ship(copy, "laptop", tmp_path / "out")


def test_what_is_shipped_has_no_path_that_verify_refuses(tmp_path: Path, pico_expert: Path) -> None:
    """A path counts with the folder that an archive puts around it."""
    copy = tmp_path / "expert"
    shutil.copytree(pico_expert, copy)
    card = json.loads((copy / "expert.json").read_text())
    # NAME-server/NAME.service
    most = (LONGEST - len("-server/.service")) // 2
    for number, kind in enumerate(("zip", "none")):
        (copy / "expert.json").write_text(json.dumps({**card, "name": "n" * most}))
        bundle = ship(copy, "server", tmp_path / str(number), archive=kind)
        verify(bundle.archive or tmp_path / str(number))
        before = sorted(tmp_path.iterdir())
        (copy / "expert.json").write_text(json.dumps({**card, "name": "n" * (most + 1)}))
        with pytest.raises(
            InvalidRequest, match=r"\.service cannot be in a bundle: it has a path of more than 240 bytes"
        ):
            ship(copy, "server", tmp_path / "out", archive=kind)
        assert sorted(tmp_path.iterdir()) == before


def test_an_artifact_that_changed_since_the_build_is_not_shipped(tmp_path: Path, pico_expert: Path) -> None:
    copy = tmp_path / "expert"
    shutil.copytree(pico_expert, copy)
    for name in (f"gguf/{GGUF}", "onnx/int4/model.onnx.data"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InvalidRequest, match=r"is not what expert\.json says .* build the expert again"):
            ship(copy, "laptop", tmp_path / "out")
        (copy / name).write_bytes(content)
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


WITHOUT = """
import sys
for name in ("zstandard", "model_signing", "cyclonedx", "spdx", "cryptography"):
    sys.modules[name] = None
from cusprun.cli import main
sys.argv[0] = "cusprun-edge"
main()
"""


def test_without_the_extra_a_bundle_can_be_verified_and_the_rest_says_what_to_install(
    laptop: Path, tmp_path: Path, pico_expert: Path
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", WITHOUT, *map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stderr

    assert run("verify", laptop) == (0, "")
    assert run("verify", laptop.with_name("pico.zip")) == (0, "")
    shipping = ("ship", pico_expert, "--target", "laptop", "--out", tmp_path / "out")
    for arguments in (shipping, ("keygen", "--out", tmp_path / "key")):
        code, told = run(*arguments)
        assert (code, "pip install 'cusprun[ship]'" in told) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_bundle_leaves_nothing(
    tmp_path: Path, pico_expert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cusprun.deploy.ship.write_archive", full)
    with pytest.raises(OSError, match="No space"):
        ship(pico_expert, "laptop", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path, pico_expert: Path) -> None:
    done = cli("keygen", "--out", tmp_path / "key", "--passphrase", CUSPRUN_PASSPHRASE="correct horse")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "bundle.zip"
    refused = cli("ship", pico_expert, "--target", "laptop", "--out", out, "--sign", tmp_path / "key",
                  CUSPRUN_PASSPHRASE="wrong")  # fmt: skip
    assert (refused.returncode, refused.stdout, out.exists()) == (2, "", False)
    done = cli("ship", pico_expert, "--target", "laptop", "--out", out, "--sign", tmp_path / "key", "--json",
               CUSPRUN_PASSPHRASE="correct horse")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["archive"], document["archive_sha256"]) == (str(out), sha256_file(out))
    assert document["folder"] is None
    done = cli("verify", out)
    assert (done.returncode, "was not checked: give --key" in done.stdout) == (0, True)
    done = cli("unpack", out, "--out", tmp_path / "folder", "--key", tmp_path / "key.pub", "--json")
    assert json.loads(done.stdout)["signature"] == "verified"
    (tmp_path / "folder" / "start.sh").write_text("#!/bin/sh\n")
    done = cli("verify", tmp_path / "folder", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "start.sh has 10 bytes instead of" in done.stderr
    assert cli("verify", tmp_path / "absent").returncode == 2
    assert command.__doc__ is not None
    assert "Example: cusprun-edge ship" in command.__doc__
