"""A trained parser as a model folder of the Hugging Face hub, on disk. Nothing is uploaded.

    python tools/huggingface.py RUN_DIR OUT_DIR --name sst-lite --license apache-2.0
    python -c "import sst; parser = sst.load('OUT_DIR')"

OUT_DIR gets model.safetensors, config.json (sizes, classes, colours, how photos are prepared) and README.md,
a model card to be completed. Needs the package safetensors, as reading such a folder does.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sst import checkpoint  # noqa: E402
from sst.errors import InputError, run_program  # noqa: E402

CARD = """\
---
license: {license}
library_name: sst
pipeline_tag: image-segmentation
tags: [human-parsing, semantic-segmentation]
---

# {name}

A human parser: of every pixel of a person the body part or garment, in {count} label set(s) at once. Trained
with sst, an implementation of *Semantic Human Parsing via Scalable Semantic Transfer over Multiple Label
Domains* (CVPR 2023).

```python
import sst                                    # pip install the repository
parser = sst.load("PATH OF THIS FOLDER")
masks = parser("photo.jpg")                   # {{label set: (h, w) class ids}}
```

| label set | classes |
|---|---|
{rows}

**To be completed:** the data and their licence, the command that trained it, scores with their command, what
it cannot do.
"""


def main():
    p = argparse.ArgumentParser("huggingface.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="RUN_DIR|model.pt")
    p.add_argument("out", metavar="OUT_DIR")
    p.add_argument("--name", default="sst", help="the model's name on its card (sst)")
    p.add_argument("--license", default="other", metavar="ID", help="the hub's name of its licence (other)")
    args = p.parse_args()
    write(Path(args.model), Path(args.out), args.name, args.license)
    print(f"wrote {args.out}")


def write(path, out, name, licence):
    """The folder. Raises InputError where the model cannot be read, or the folder holds something."""
    save_file = checkpoint.safetensors().save_file
    path = path / "model.pt" if path.is_dir() else path
    checkpoint.load_model(path)  # refuses what is none
    content = checkpoint.load(path, "model")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; give a folder that is")
    out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in content.pop("weights").items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    rows = "\n".join(f"| {d['name']} | {', '.join(d['classes'])} |" for d in content["domains"])
    card = CARD.format(name=name, license=licence, count=len(content["domains"]), rows=rows)
    (out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    run_program(main, "huggingface.py")
