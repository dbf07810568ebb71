"""A chat in the terminal: tokens as they come, and no token of an earlier turn computed again.

    python examples/chat.py --model Qwen/Qwen3-0.6B
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_paged


def turn_ids(tokenizer, text: str, is_first: bool) -> list[int]:
    """Tokens of the user's turn and the beginning of the answer. The history is kept as ids, never tokenised again."""
    if tokenizer.chat_template is None:  # a base model goes on with the text
        return tokenizer(text + "\n").input_ids
    message = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids if is_first else [*tokenizer("\n", add_special_tokens=False).input_ids, *ids]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: 512)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = GenerationConfig(max_new_tokens=options.max_new_tokens)
    history: list[int] = []
    with hf_paged.Engine(model, hf_paged.EngineConfig(max_num_seqs=1)) as engine:
        print("Type a message; an empty line or the end of the input ends the chat.")
        for line in sys.stdin:
            if not line.strip():
                break
            history += turn_ids(tokenizer, line.strip(), is_first=not history)
            handle = engine.submit(history, generation_config=config)
            answer: list[int] = []
            shown = ""
            for token in handle:
                answer.append(token)
                text = tokenizer.decode(answer, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
            result = handle.result()
            print(f"\n[{result.cached_tokens} of {len(history)} prompt tokens were found in the cache]")
            history += answer


if __name__ == "__main__":
    main()
