"""What each process of test_accelerate_loop.py runs: `torchrun accelerate_ranks.py MODEL FOLDER`."""

import sys
from pathlib import Path

import torch

from examples import accelerate_loop, plain_loop
from examples.distributed_loop import teach_together
from softprompt_kernels.prompts import EmbeddingPrompt
from tests.examples.loop_problems import end_if_stuck, read_problem


def main() -> None:
    end_if_stuck()
    model_folder, folder = sys.argv[1], Path(sys.argv[2])
    model, text, sequences, _ = read_problem(model_folder)
    plain_loop.prepare(model)
    accelerator = accelerate_loop.make_accelerator()
    moments = teach_together(model, text, sequences)
    examples = plain_loop.numbered(sequences)
    results = {"moments": moments.mean, "processes": accelerator.num_processes}

    def train(name, prompt=None, **options):
        prompt = plain_loop.first_tokens(model, text, 8) if prompt is None else prompt
        each = accelerate_loop.make_accelerator(accumulate=2, cpu=True)
        losses = accelerate_loop.train(each, model, prompt, examples, moments, batch_size=1, **options)
        results[name] = losses, torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()])

    train("all", epochs=3)
    train("stopped", epochs=2, checkpoint=folder / "checkpoint", save_every=3)  # saved after 3 of 4 steps
    train("resumed", epochs=3, checkpoint=folder / "checkpoint", save_every=100)
    train("embedding", EmbeddingPrompt(model.get_input_embeddings()(text[0, :8])), epochs=1)
    if accelerator.is_main_process:
        torch.save(results, folder / "results.pt")
    sys.argv[1:] = [model_folder, str(folder / "text.txt"), str(folder / "prompt")]
    accelerate_loop.main()


if __name__ == "__main__":
    main()
