# SPDX-License-Identifier: Apache-2.0
"""Prune a model, train LoRA on the pruned model, merge, save, and load it again as any other model.

    python examples/lora_on_pruned.py HuggingFaceTB/SmolLM2-135M-Instruct gsm8k/train.jsonl out

The file holds one JSON object a line, with "question" and "answer". About 10 minutes on 2 CPU cores.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from transformers import TrainingArguments as Arguments

from eigenprune import EigenpruneConfig, prune_, save_model

ASK = "Question: A box holds 12 eggs. I have 3 boxes and use 7 eggs. How many eggs are left?\nAnswer:"


def main(name: str, data: Path, out: Path) -> None:
    """From the dense model `name` to `out`/merged."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}{tokenizer.eos_token}" for row in rows]

    # Keep 70 % of the parameters of the linear layers: those that matter for texts like these.
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    report = prune_(model, EigenpruneConfig(keep=0.7, windows=48, window=256), tokenizer=tokenizer, texts=texts)
    save_model(model, out / "pruned", tokenizer=tokenizer, report=report)  # adapters name this folder as their base
    model = AutoModelForCausalLM.from_pretrained(out / "pruned")

    # LoRA as on any model: a factored q_proj is a target like a dense one.
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    settings = Arguments(str(out / "training"), max_steps=100, per_device_train_batch_size=2, learning_rate=5e-4,
                         warmup_steps=10, logging_steps=10, save_strategy="no", report_to="none")  # fmt: skip
    Trainer(
        model=model,
        args=settings,
        train_dataset=[tokenizer(text, truncation=True, max_length=128) for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()

    # Exact: [left, B] @ [right; A]. The result is of the old class again, and needs no peft.
    save_model(model.merge_and_unload(), out / "merged", tokenizer=tokenizer)
    again = AutoModelForCausalLM.from_pretrained(out / "merged")
    answer = again.generate(**tokenizer(ASK, return_tensors="pt"), max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(answer[0]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
