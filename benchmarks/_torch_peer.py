"""Times a PyTorch VMamba on request: reads JSON lines, writes seconds.

Started by model.py; the first line it writes says that it is ready.
"""

import importlib.util
import inspect
import json
import sys
import time
from pathlib import Path

import torch


def load(path: Path):
    """Imports the module and returns its class `VSSM`."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("peer_vmamba", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VSSM


def main() -> None:
    """Serves until standard input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # what the module prints is not an answer
    vssm = load(Path(sys.argv[1]))
    known = inspect.signature(vssm).parameters
    print("ready", file=out, flush=True)
    models = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["config"])
        if key not in models:
            config = {k: v for k, v in request["config"].items() if k in known}
            models[key] = vssm(**config).float()
        model = models[key].train(request["train"])
        size = request["image_size"]
        images = torch.randn(request["batch"], 3, size, size)
        start = time.perf_counter()
        if request["train"]:
            model.zero_grad()
            torch.nn.functional.cross_entropy(
                model(images), torch.zeros(request["batch"], dtype=torch.long)
            ).backward()
        else:
            with torch.inference_mode():
                model(images)
        print(time.perf_counter() - start, file=out, flush=True)


if __name__ == "__main__":
    main()
