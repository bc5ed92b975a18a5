import subprocess
import sys

EXTRAS = ("timm", "torchvision", "transformers", "safetensors", "PIL", "rich", "typer", "onnx", "tomli_w", "matplotlib")


def test_importing_vitquant_imports_no_extra():
    code = f"import sys, vitquant; vitquant.quantize; print([name for name in {EXTRAS!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
