"""What a checkpoint is: whose, which network, and what of it is no use here. Nothing is loaded.

print(inspect("model.safetensors"))
python -m vitkern inspect FILE
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from vitkern._table import columns
from vitkern.checkpoint import Checkpoint, CheckpointError, Source, read, understand
from vitkern.model.config import ViTConfig

# Always shown, even where they are the defaults.
_SIZES = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "norm_layer", "act_layer"),
)
# Nothing that a checkpoint could tell.
_RUN = ("impl", "save", "residual_dtype", "drop_path_mode", "weight_init", "fix_init")


@dataclass(frozen=True)
class Report:
    """What `inspect` found.

    source: path, or "state dict". library: whose names it has. format: what `save` calls that.
    container: "safetensors", "torch", "npz", "folder" or "state dict"; part: keys that lead to the
    tensors within. models: timm's names of models with these shapes. architecture: fields of
    `ViTConfig`, the sizes and all that aren't defaults. parameters: how many, of the model.
    dtypes: of the tensors -> how many numbers. assumed: field -> why, where the checkpoint doesn't
    tell it. dropped: key -> why it is left out.
    """

    source: str
    library: str
    format: str
    container: str
    part: str
    models: tuple[str, ...]
    architecture: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]
    assumed: dict[str, str]
    dropped: dict[str, str]

    def facts(self) -> list[list[str]]:
        """Name and value of what isn't of the architecture."""
        more = len(self.models) - 3
        names = ", ".join(self.models[:3]) + (f" and {more} more" if more > 0 else "")
        kinds = ", ".join(f"{dtype} {count:,}" for dtype, count in self.dtypes.items())
        return [
            ["checkpoint", self.source],
            ["written by", f"{self.library} (format {self.format!r})"],
            ["container", self.container + (f", under {self.part!r}" if self.part else "")],
            ["shapes of timm's", names or "no model that has a name"],
            ["parameters", f"{self.parameters:,}"],
            ["numbers stored", kinds],
        ]

    def fields(self) -> list[list[str]]:
        """Name, value and origin of the architecture's fields."""
        return [
            [name, _text(value), self.assumed.get(name, "")]
            for name, value in self.architecture.items()
        ]

    def left_out(self) -> list[list[str]]:
        """First name, number of tensors and reason of what is dropped."""
        groups: dict[str, list[str]] = {}
        for key, why in self.dropped.items():
            groups.setdefault(why, []).append(key)
        return [[keys[0], str(len(keys)), why] for why, keys in groups.items()]

    def __str__(self) -> str:
        parts = [columns(self.facts()), columns([_FIELDS, *self.fields()])]
        if self.dropped:
            parts.append(columns([_DROPPED, *self.left_out()]))
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """Everything, for other programs."""
        return json.dumps(asdict(self), indent=2, default=str)


_FIELDS = ["architecture", "value", "assumed"]
_DROPPED = ["left out", "tensors", "why"]


def inspect(
    path_or_state: str | os.PathLike[str] | Mapping[str, Any] | Source, **overrides: Any
) -> Report:
    """What a checkpoint is, without making a model of it. Arguments and errors as `understand`."""
    source = read(path_or_state)
    return report(understand(source, **overrides))


def report(found: Checkpoint) -> Report:
    """What is known of an understood checkpoint."""
    config, default = found.config, ViTConfig()
    shown = {
        name: value
        for name, value in vars(config).items()
        if name in _SIZES
        or name in found.assumed
        or (name not in _RUN and value != getattr(default, name))
    }
    source, dtypes = found.source, Counter[str]()
    for tensor in source.state.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return Report(
        source="state dict" if source.path is None else str(source.path),
        library=found.format.title,
        format=found.format.name,
        container=source.container,
        part=source.part,
        models=found.names,
        architecture=shown,
        parameters=sum(tensor.numel() for tensor in found.state.values()),
        dtypes=dict(dtypes),
        assumed=found.assumed,
        dropped=found.dropped,
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_text(one) for one in value) + ")"
    return str(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("file", help="a file or folder of weights, of any library")
    parser.add_argument("--json", action="store_true", help="for other programs")


def run(options: argparse.Namespace) -> int:
    """Print what the file is; 2 where it can't be read, the reason on stderr."""
    try:
        found = inspect(options.file)
    except (CheckpointError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(found.to_json())
    elif find_spec("rich") is None:
        print(found)
    else:
        _show(found)
    return 0


def _show(found: Report) -> None:
    from rich import box, markup
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tables = [(None, found.facts()), (_FIELDS, found.fields()), (_DROPPED, found.left_out())]
    for head, lines in tables:
        if not lines:
            continue
        table = Table(*(head or []), box=box.SIMPLE_HEAD, show_header=head is not None)
        for line in lines:
            table.add_row(*map(markup.escape, line))
        console.print(table)
