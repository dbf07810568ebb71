"""Replicas of an engine behind Ray Serve: text as it comes; a client that goes away ends its request.

    pip install "ray[serve]"
    python examples/ray_serve.py --model PATH --replicas 2 --gpus 1
    curl -N localhost:8000/generate -H "Content-Type: application/json" -d '{"prompt": "def main():"}'
"""

import argparse

import torch
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_paged

app = FastAPI()


@serve.deployment(max_ongoing_requests=512)  # more than the engine runs at a time: it is kept full
@serve.ingress(app)
class Generate:
    """A replica."""
    def __init__(self, name: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows a replica its own GPUs only
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.engine = hf_paged.Engine(AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device))

    @app.post("/generate")
    async def generate(self, prompt: str = Body(), max_new_tokens: int = Body(128)) -> StreamingResponse:
        """The answer, as plain text."""
        config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
        try:
            handle = self.engine.submit(self.tokenizer(prompt).input_ids, generation_config=config)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return StreamingResponse(self._texts(handle), media_type="text/plain")

    @app.get("/running")
    def running(self) -> list[int]:
        """How many requests a replica has, and how many new tokens it has made."""
        return [len(self.engine.snapshot().requests), self.engine.num_new_tokens]

    async def _texts(self, handle: hf_paged.RequestHandle):
        try:  # Serve cancels this where the client has gone.
            async for event in handle.events(self.tokenizer):
                yield event.text
        finally:
            handle.cancel()  # does nothing to a request that has ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--replicas", type=int, default=1, help="engines (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica (default: 0)")
    options = parser.parse_args()
    replicas = Generate.options(num_replicas=options.replicas, ray_actor_options={"num_gpus": options.gpus})
    serve.run(replicas.bind(options.model), blocking=True)
