"""`python -m tools.train_model.evaluate --model DIR --text DIR`: held-out loss, recall by distance, sample texts.

Runs through plain `transformers`; filler and loss come from the files that training never sees.
"""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
from tools.train_model.text import is_held_out, read_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

LOSS_WINDOW = 512  # tokens of context at most, the length of most of the training
TEXT_PROMPTS = ("The list type has a method that", "# Reading files\n\nTo open a file", "Changed in version 3.5.")
CHAT_PROMPTS = (
    "Hello",
    "What is a list?",
    "What does os.path.join do?",
    "Tell me about regular expressions.",
    "Write a short story about a dog.",
    "How do I open a file?",
)


def main() -> None:
    """Prints the three parts of the report."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_model.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--text", type=Path, required=True, help="the folder given to training")
    parser.add_argument("--distances", type=int, nargs="*", default=[512, 2048, 4096, 8192, 15_800])
    parser.add_argument("--keys", type=int, default=50, help="keys per distance and form")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype)).eval()
    prose = [d.prose for d in read_documents(flags.text) if is_held_out(d)]
    with torch.inference_mode():
        print_loss(model, tokenizer, prose)
        print_recall(model, tokenizer, prose, distances=flags.distances, keys=flags.keys, seed=flags.seed)
        print_samples(model, tokenizer)


def print_loss(model: Any, tokenizer: Any, prose: list[str]) -> None:
    """Mean cross entropy over the held-out files, per token and per byte."""
    total, count = 0.0, 0
    for text in prose:
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        for window in ids.split(LOSS_WINDOW):
            if len(window) > 1:
                total += model(window[None], labels=window[None]).loss.item() * (len(window) - 1)
                count += len(window) - 1
    size = sum(len(text.encode()) for text in prose)
    print(f"held-out loss {total / count:.3f} nats per token, {total / math.log(2) / size:.3f} bits per byte", flush=True)


def print_recall(model: Any, tokenizer: Any, prose: list[str], *, distances: list[int], keys: int, seed: int) -> None:
    """Share of five-digit keys recalled exactly by greedy decoding, by tokens between key and question."""
    ids: list[int] = tokenizer("\n\n".join(prose), verbose=False).input_ids
    print("distance  text  chat", flush=True)
    for distance in distances:
        rng = random.Random(seed)
        right = [0, 0]
        for _ in range(keys):
            key = f"{rng.randrange(100_000):05d}"
            at = rng.randrange(len(ids) - distance)
            filler = tokenizer.decode(ids[at : at + distance])
            for form, prompt in enumerate((text_prompt(key, filler), chat_prompt(tokenizer, key, filler))):
                right[form] += key in continuation(model, tokenizer, prompt, limit=24)
        print(f"{distance:8d}  {right[0] / keys:4.0%}  {right[1] / keys:4.0%}", flush=True)


def print_samples(model: Any, tokenizer: Any) -> None:
    """Greedy chat replies, and text at temperature 0.7."""
    torch.manual_seed(0)
    for prompt in TEXT_PROMPTS:
        print(f"--- {prompt}|{continuation(model, tokenizer, prompt, limit=120, temperature=0.7)}", flush=True)
    for message in CHAT_PROMPTS:
        rendered = render(tokenizer, [{"role": "user", "content": message}])
        print(f"--- {message}\n{continuation(model, tokenizer, rendered, limit=200)}", flush=True)


def text_prompt(key: str, filler: str) -> str:
    """Running text that states the key, goes on for long, and asks."""
    return f"The pass key is {key}. Remember it.\n\n{filler}\n\nWhat is the pass key? The pass key is"


def chat_prompt(tokenizer: Any, key: str, filler: str) -> str:
    """A chat whose first turn states the key and whose second asks for it."""
    told = {"role": "user", "content": f"The pass key is {key}. Remember it.\n\n{filler}"}
    noted = {"role": "assistant", "content": "OK, I will remember it."}
    return render(tokenizer, [told, noted, {"role": "user", "content": "What is the pass key?"}])


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The chat as the model reads it, up to the assistant's turn."""
    rendered: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return rendered


def continuation(model: Any, tokenizer: Any, prompt: str, *, limit: int, temperature: float | None = None) -> str:
    """At most `limit` tokens after the prompt, greedy without a temperature; an end token shows as `<|im_end|>`."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **sampling)
    decoded: str = tokenizer.decode(out[0, ids.shape[1] :])
    return decoded


if __name__ == "__main__":
    main()
