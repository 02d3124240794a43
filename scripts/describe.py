"""The layers of a network and what they cost: `python scripts/describe.py --config resnet20`.

Any setting of the model can be overridden: `--config.model.depth=56`. With --checkpoint the network
is that of a work directory or of a PyTorch file. Every layer has a line: what it is, the height,
width and channels of its output, its parameters (with those of the BatchNorm that follows it), and
the multiply-adds of one image, which the paper counts as FLOPs. The last line is their sums.
"""

import json
import re

from absl import flags

from flax_resnet import cli
from flax_resnet.config import ResNetConfig, Stages
from flax_resnet.errors import ConfigError
from flax_resnet.studies.description import Description, Size, describe
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import is_run, locate, read_config
from flax_resnet.weights import files
from flax_resnet.weights.state_dict import from_state_dict

CONFIG = cli.define_config(default="resnet20", names=("model",))
CHECKPOINT = cli.define_place(
    "checkpoint", None, "in --config's place: WORKDIR or a PyTorch file; also by a bucket's URL"
)
SIZE = flags.DEFINE_string(
    "size", None, "the image's pixels, 224 or HEIGHTxWIDTH; default: 32, of ImageNet's networks 224"
)
JSON = flags.DEFINE_bool("json", False, "print it as one line of JSON")


def main() -> None:
    model = read_model() if CHECKPOINT.value else cli.experiment(CONFIG).model
    size = read_size(model)
    found = describe(model, size)
    title = f"{model.label}, images of {size[0]} x {size[1]} pixels"
    print(as_json(title, found) if JSON.value else "\n".join([title, "", *as_table(found)]))


def read_model() -> ResNetConfig:
    """The network of --checkpoint."""
    if flags.FLAGS["config"].present or cli.overrides():
        raise ConfigError("--checkpoint says what its network is; leave --config away")
    path = fetch(CHECKPOINT.value)
    if is_run(path):
        return read_config(locate(path)[0]).model
    return from_state_dict(files.read(path).state_dict).config


def read_size(model: ResNetConfig) -> Size:
    is_large = model.stages is Stages.IMAGENET and "conv7" in model.stem.value
    text = SIZE.value or ("224" if is_large else "32")
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise ConfigError(f"--size must be a number of pixels or HEIGHTxWIDTH, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def as_table(found: Description) -> list[str]:
    """Columns as wide as they must be: texts to the left, numbers to the right."""
    cells = [("layer", "what", "output", "parameters", "multiply-adds")]
    for row in found.rows:
        output = f"{row.size[0]} x {row.size[1]} x {row.channels}"
        cells.append((row.name, row.kind, output, f"{row.parameters:,}", f"{row.multiply_adds:,}"))
    total = f"{found.parameters:,}", f"{found.multiply_adds:,} ({found.multiply_adds:.1e})"
    cells.append(("all", "", "", *total))
    widths = [max(map(len, column)) for column in zip(*cells[:-1], strict=True)]
    widths[3] = max(widths[3], len(total[0]))
    lines = [
        f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}"
        for a, b, c, d, e in cells
    ]
    return lines


def as_json(title: str, found: Description) -> str:
    layers = [row._asdict() for row in found.rows]
    totals = {"parameters": found.parameters, "multiply_adds": found.multiply_adds}
    return json.dumps({"network": title, **totals, "layers": layers})


if __name__ == "__main__":
    cli.run(main)
