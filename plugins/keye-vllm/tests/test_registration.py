"""The plug-in adds Keye-VL-2.0 to vLLM and leaves vLLM's own Preview and 1.5 as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

#: Run in a process of its own, since registries are filled once in a process: what vLLM and transformers take for a
#: model, with the plug-in loaded as vLLM loads it.
_PROGRAM = """
import json, sys
from pathlib import Path
from vllm.plugins import load_general_plugins
load_general_plugins()
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm import ModelRegistry
from vllm.model_executor.models.registry import ModelRegistry as registry
found = {"registered": sorted(name for name in CONFIG_MAPPING._extra_content if "eye" in name)}
found["keye.hf"] = "keye.hf" in sys.modules
for name in sys.argv[2:]:
    found[name] = registry._try_load_model_cls(name).__module__
folder = Path(sys.argv[1])
for kind in ("Keye", "KeyeVL1_5"):
    (folder / "config.json").write_text(json.dumps({
        "model_type": kind, "auto_map": {"AutoConfig": "configuration_own.Own"}, "hidden_size": 7}))
    (folder / "configuration_own.py").write_text(
        "from transformers import PreTrainedConfig\\nclass Own(PreTrainedConfig):\\n    model_type = %r\\n" % kind)
    found[kind] = type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__module__.split(".")[0]
print(json.dumps(found))
"""
_THEIRS = {
    "KeyeForConditionalGeneration": "vllm.model_executor.models.keye",
    "KeyeVL1_5ForConditionalGeneration": "vllm.model_executor.models.keye_vl1_5",
}


def test_the_models_of_vllm_stay_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path), *_THEIRS, "KeyeVL2MoeForConditionalGeneration"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["registered"] == ["KeyeVL2"] and not result["keye.hf"]
    assert {name: result[name] for name in _THEIRS} == _THEIRS
    assert result["KeyeVL2MoeForConditionalGeneration"] == "keye_vllm.model"
    assert result["Keye"] == result["KeyeVL1_5"] == "transformers_modules", "the checkpoint's own configuration"
