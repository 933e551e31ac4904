"""A tour of the index on keys of the default model.

    python tools/capture.py -d 4096 -o capture.npz        # a minute or two: the model reads, its cache is kept
    python docs/index_tutorial.py capture.npz -o docs/index_tutorial.png

Builds an index for each layer, asks every oracle which keys a decode step has to look at, draws how many
that are, layer by layer, and prints what is proven of the attention of one layer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import louver_llama as ll
from louver_llama import oracles

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from capture_file import decoded, load_layers

ORACLES = {
    "mass, epsilon 0.05": oracles.Mass(0.05),
    "mass, epsilon 0.01": oracles.Mass(0.01),
    "top-k, k = 256": oracles.TopK(256),
    "budget, a tenth": oracles.Budget(0.1),
    "sample-max": oracles.SampleMax(),
    "sample-mean-max": oracles.SampleMeanMax(),
    "sample-gap": oracles.SampleGap(),
    "sample-top-k, k = 16": oracles.SampleTopK(16),
}


def main() -> None:
    """Run the tour."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("capture", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("index_tutorial.png"), metavar="FNAME")
    options = parser.parse_args()

    layers = list(load_layers(options.capture))
    kept = {name: np.zeros(len(layers)) for name in ORACLES}
    dropped = {name: np.zeros(len(layers)) for name in ORACLES}
    for i, layer in enumerate(layers):
        # One index holds all KV heads of a layer: (n_head_kv, n, dim). No copy is made of the transposed view.
        keys = decoded(layer.k, layer.type_k).transpose(1, 0, 2)
        index = ll.Index.build(keys, copy=False)
        # The queries of a step, (n_head, dim): each KV head serves the next n_gqa of them.
        for name, oracle in ORACLES.items():
            chosen = index.select(layer.queries[-1], oracle, scale=layer.scale)
            kept[name][i] = chosen.matches.counts.mean() / len(index)
            dropped[name][i] = np.mean([certificate.delta for certificate in chosen.certificates])

    print(f"{options.capture.name}: {len(layers)} layers, {len(index):,} keys in each head\n")
    print(f"{'oracle':24}{'keys kept':>12}{'mass dropped, at most':>24}{'worst layer':>14}")
    for name in ORACLES:
        print(f"{name:24}{kept[name].mean():>12.1%}{dropped[name].mean():>24.1%}{dropped[name].max():>14.1%}")

    middle = layers[len(layers) // 2]
    index = ll.Index.build(decoded(middle.k, middle.type_k).transpose(1, 0, 2), copy=False)
    values = decoded(middle.v, middle.type_v).transpose(1, 0, 2)
    query = middle.queries[-1]
    output, certificates = ll.attention(query, index, values, oracles.Mass(0.05), scale=middle.scale)
    dense, _ = ll.attention(query, index, values, oracles.Mass(0), scale=middle.scale)
    error = np.linalg.norm(output - dense, axis=1)
    print(f"\nlayer {middle.number}, head 0, attention with epsilon 0.05:")
    for field, value in vars(certificates[0]).items():
        print(f"    {field:12} {value}")
    print(f"    true error   {error[0]:.3g} of an output of length {np.linalg.norm(dense[0]):.3g}")

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name, share in kept.items():
        axes.plot(share, marker=".", label=name)
    axes.set(xlabel="layer", ylabel="keys kept, share of all (mean over heads)", yscale="log")
    axes.set_title(f"What each oracle keeps of {len(index):,} keys")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(options.output, dpi=110)
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
