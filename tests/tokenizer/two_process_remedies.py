"""Everything about the codebook that processes share: run by `test_remedies_two_processes.py`.

python two_process_remedies.py OUT.pt MEETING_FILE RANK PROCESSES
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from codebook_fits import smooth_images, tiny

from mvar_lightning.metrics.quality import CodebookUsage
from mvar_lightning.tokenizer import DataDependentInit, DeadCodeRestart, EntropyLoss
from mvar_lightning.tokenizer import codebook as initialization

BATCH, STEPS = 32, 6


def rounded_differently(rank: int) -> None:
    """As on GPUs, where the sums of k-means differ in rounding from process to process."""
    exact = initialization.k_means
    initialization.k_means = lambda *given: exact(*given) * (1 + 1e-4 * rank)


def main(out: str, meeting: str, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    rounded_differently(rank)
    tokenizer, entropy = tiny(), EntropyLoss(weight=0.1)
    remedies = [DataDependentInit(batches=2), DeadCodeRestart(every=2, threshold=0.5, rows=64)]
    for part in remedies:
        part.attach(tokenizer)
    usage = CodebookUsage(tokenizer.pyramid, tokenizer.vocab_size)
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.01)
    images = smooth_images(BATCH * STEPS).unflatten(0, (STEPS, processes, -1))[:, rank]
    codes = []
    for image in images:
        for remedy in remedies:
            remedy.before_step(tokenizer, image)
        output = tokenizer(image)
        usage.update(output.idx_BL)
        optimizer.zero_grad()
        loss = (output.reconstruction_B3HW - image).square().mean() + output.quantizer_loss
        (loss + entropy.weight * entropy(output, image)).backward()
        for parameter in tokenizer.parameters():
            if parameter.grad is not None and processes > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= processes
        optimizer.step()
        for remedy in remedies:
            remedy.after_step(tokenizer, output, optimizer)
        codes.append(tokenizer.quantizer.codebook.weight.detach().clone())
    replaced = torch.tensor(sorted(tokenizer.quantizer.replaced_codes))
    torch.save(
        {"codes": torch.stack(codes), "replaced": replaced, **usage.compute(), **tokenizer.state_dict()},
        f"{out}.{rank}",
    )
    if processes > 1:  # left to the interpreter's end, gloo's threads now and then abort the process
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
