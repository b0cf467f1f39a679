import json

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from cluster.errors import UserError
from training.adapter_files import copy_directory, save_adapter
from training.config import LoraSection
from training.lora_engine import with_lora


def test_save_adapter_plain_peft_reads_it_and_no_path_of_this_machine_stands_in_it(base_path, tmp_path):
    torch.manual_seed(1)
    adapted = with_lora(LlamaForCausalLM.from_pretrained(base_path), LoraSection(rank=4, alpha=8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    weights = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    ids = torch.arange(20)[None]
    expected = adapted.eval()(input_ids=ids).logits
    for (
        parameter
    ) in adapted.parameters():  # the model's own weights may be elsewhere (ZeRO-3): they are not what is saved
        parameter.data = torch.zeros(0)
    save_adapter(adapted, weights, "embedded:Some-Model", str(tmp_path / "adapter"))
    found = tmp_path / "adapter"
    assert {path.name for path in found.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((found / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "embedded:Some-Model"
    assert str(base_path) not in (found / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_path), found)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_copy_directory_to_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "history.jsonl").write_text("{}")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"^store\.uri: cannot write .*taken/adapter: ") as caught:
        copy_directory(str(tmp_path / "from"), str(tmp_path / "taken" / "adapter"))
    assert "\n" not in str(caught.value)
