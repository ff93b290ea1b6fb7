# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many architectures, and a tokenizer, made on the spot."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 128
WIDTH = 64
POSITIONS = 64
# Large enough that outputs depend on every layer, so that a wrong or missing one shows.
SPREAD = 0.1

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": SPREAD,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=True))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        initializer_range=SPREAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER | {"num_key_value_heads": 2}, tie_word_embeddings=False))


def _phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_DECODER | {"num_key_value_heads": 2}, tie_word_embeddings=False))


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**_ENCODER))


def _albert() -> PreTrainedModel:
    return AlbertForMaskedLM(AlbertConfig(**_ENCODER, embedding_size=32))


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    return T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "bert": _bert,
    "albert": _albert,
    "t5": _t5,
}


def tiny_model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model, the same at every call, with biases and norms that are not the zeros and ones of a fresh one."""
    torch.manual_seed(len(kind))
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * SPREAD)
            # Not model.to(dtype): `from_pretrained` too keeps buffers that are not saved (rotary frequencies) as is.
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of code 3 to 127; the ids fill the tiny vocabulary exactly."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(code): code for code in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def saved_dense(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **save: str) -> Path:
    """The tiny model with its tokenizer, as a stock checkpoint."""
    tiny_model(kind, dtype).save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def token_windows(count: int = 4, window: int = 32) -> Tensor:
    """[count, window] random token ids, the same at every call."""
    return torch.randint(3, VOCABULARY, (count, window), generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module) -> Tensor:
    """The output of `model` on a fixed input: logits, or the last hidden state of a trunk."""
    ids = token_windows(2, 12)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :8]
    with torch.no_grad():
        output = model(**inputs)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).detach()
