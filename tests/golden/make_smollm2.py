"""Make ``smollm2.json``: what transformers answers to 20 prompts, greedily, from the same GGUF.

    python -m tests.golden.make_smollm2 GGUF

float32 on one thread, 64 tokens each, end tokens not stopping. ``margins`` says how far the best
token was ahead of the second, so that a difference can be told from a near tie.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("smollm2.json")
NUM_TOKENS = 64

OPENINGS = (
    "The",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three laws of motion are",
    "Water boils at",
    "SELECT name, count(*) FROM",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
    "Il était une fois",
    "The capital of France is",
)


def prompts(tokenizer: Any) -> list[list[int]]:
    """Return ten openings and ten stretches of mixed text of 3 to 700 tokens."""
    draw = random.Random(2)
    found = [tokenizer.encode(text) for text in OPENINGS]
    words = " ".join(OPENINGS).split()
    for length in (3, 17, 31, 64, 65, 127, 200, 333, 512, 700):
        text = " ".join(draw.choice(words) for _ in range(length))
        found.append(tokenizer.encode(text)[:length])
    return found


def answers(gguf: Path) -> dict[str, Any]:
    """Return the golden content."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    rows = []
    for prompt in prompts(tokenizer):
        done = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = done.sequences[0, len(prompt) :].tolist()
        scores = torch.stack(done.logits)[:, 0].double().log_softmax(-1)
        best = scores.topk(2).values
        rows.append(
            {
                "prompt_ids": prompt,
                "token_ids": tokens,
                "logprobs": [round(scores[i, t].item(), 6) for i, t in enumerate(tokens)],
                "margins": [round(m, 6) for m in (best[:, 0] - best[:, 1]).tolist()],
            }
        )
    return {"model": "smollm2-135m", "num_tokens": NUM_TOKENS, "rows": rows}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(answers(Path(sys.argv[1])), separators=(",", ":")) + "\n")
