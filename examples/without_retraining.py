"""Compress a trained network without training it again: accuracy by pass, and what was predicted.

Trains on scikit-learn's handwritten digits in seconds. Needs: pip install 'fxsvd[demo]'
"""

import torch

import fxsvd
from fxsvd import demo
from fxsvd.passes import Factorize, Fold, Prune, Select


def main() -> None:
    torch.manual_seed(0)
    digits = demo.digits()
    model = demo.DigitNet()
    demo.train(model, digits, epochs=6, rate=5e-3, progress=lambda line: None)

    # Batches of inputs are all that calibration needs: a DataLoader, or any list. No labels.
    data = list(digits.images.split(100))
    ways = {
        "pruned to half its widths": [Prune(ratio=0.5)],
        "selected and refitted to half its widths": [Select(ratio=0.5)],
        "factorised, 1 % lost in every layer": [Fold(), Factorize(error=0.01)],
        "selected, then factorised": [Fold(), Select(ratio=0.4), Factorize(error=0.01)],
    }
    print(f"{demo.accuracy(model, digits):.1%} as trained")
    for name, passes in ways.items():
        small = fxsvd.compile(model, data[0][:2], passes=passes, data=data, progress=False)
        share = small.report.after.parameters / small.report.before.parameters
        print(f"{demo.accuracy(small, digits):.1%} {name}: {share:.0%} of the parameters")

    # What each edit was expected to cost, and what it did cost where all of them came together.
    print(small.report)


if __name__ == "__main__":
    main()
