"""Install a built wheel without its dependencies beside this environment's, and use it from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main(dist: Path) -> None:
    wheel = next(dist.resolve().glob("agentmesh_kv-*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "site"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
        subprocess.run(install, check=True)
        tops = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} - {"bin"}
        assert tops == {"agentmesh"}, tops
        page = {path.name for path in (target / "agentmesh" / "serve" / "page").iterdir()}
        assert {"index.html", "page.css", "page.js", "graph.js"} <= page, page
        empty = Path(folder) / "empty"
        empty.mkdir()
        settings = {**os.environ, "PYTHONPATH": str(target)}
        mesh = ["run", "demo", "-i", "question=What?", "--set", "model=random:tiny-llama", "--display", "none"]
        evaluation = [
            "eval",
            "math-single",
            "--task",
            "math-mini",
            "--presets",
            "dense",
            "--warmup",
            "0",
            "--limit",
            "1",
        ]
        evaluation += ["--set", "model=random:tiny-llama"]
        for arguments in (["ls"], ["graph", "debate"], ["validate", "demo"], mesh, evaluation, ["report"]):
            subprocess.run([sys.executable, "-m", "agentmesh", *arguments], check=True, cwd=empty, env=settings)
    print("wheel ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
