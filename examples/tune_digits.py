"""Tune 640 regularisation strengths of softmax regression, one per pixel and class, by hypergradients.

w*(λ) = argmin_w CE_train(w) + ½ Σ exp(λ) w²,      min_λ CE_validation(w*(λ))
"""

import argparse
import json
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

import hypergrad as hg

parser = argparse.ArgumentParser(description="Tune 640 regularisation strengths on the digits by hypergradients.")
parser.add_argument("--steps", type=int, default=30, help="outer steps (default: 30, chosen on seeds 1 to 3)")
parser.add_argument("--seed", type=int, default=0, help="of the split and the initial weights (default: 0)")
parser.add_argument("--output", type=Path, default="tune_digits.png", help="the PNG; a JSON goes beside it")
parser.add_argument("--fast", action="store_true", help="3 outer steps and 3 grid points, to see that it runs")
args = parser.parse_args()
args.output.parent.mkdir(parents=True, exist_ok=True)
config = {"seed": args.seed, "steps": 3 if args.fast else args.steps, "grid points": 3 if args.fast else 17}
config |= {"split": (400, 800, 597), "lr": 0.05, "inner tolerance": 1e-7, "adjoint rtol": 1e-8}
started = time.perf_counter()
torch.set_num_threads(1)  # products this small only wait for other threads
torch.manual_seed(args.seed)
images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
train, validation, test = torch.randperm(len(labels)).split(config["split"])
both = torch.cat([train, validation])
std, mean = torch.std_mean(images[train], 0)
images = (images - mean) / std.where(std > 0, 1.0)
model = torch.nn.Linear(64, 10, dtype=torch.float64)


def loss(rows: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(images[rows]), labels[rows])


def inner_loss(lam: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return loss(rows) + 0.5 * (lam.exp() * model.weight**2).sum()


def fit(lam: torch.Tensor, rows: torch.Tensor) -> None:
    """Solve the inner problem, from where the model is, until max |∇g| is below the tolerance."""
    stop = {"max_iter": 5000, "tolerance_grad": config["inner tolerance"], "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(model.parameters(), history_size=50, line_search_fn="strong_wolfe", **stop)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = inner_loss(lam.detach(), rows)
        value.backward()
        return value

    optimizer.step(closure)


def score(lam: torch.Tensor, fitted_on: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
    fit(lam, fitted_on)
    hits = model(images[rows]).argmax(1) == labels[rows]
    return {"loss": loss(rows).item(), "accuracy": hits.double().mean().item()}


grid = tqdm(torch.logspace(0, -4, config["grid points"], dtype=torch.float64).log(), "grid search")
single = min(grid, key=lambda lam: score(lam, train, validation)["loss"])
untuned = torch.full_like(model.weight, 1 / len(train)).log()  # scikit-learn's default, C = 1, for a mean loss
lam = untuned.clone().requires_grad_()
optimizer, solver = torch.optim.Adam([lam], lr=config["lr"]), hg.solvers.CG(rtol=config["adjoint rtol"])
adjoint, curves = None, {"validation": [], "test": [], "adjoint (warm start)": [], "adjoint": [], "inner problem": []}
for _ in tqdm(range(config["steps"]), "hypergradients"):
    fit(lam, train)
    optimizer.zero_grad()
    result = hg.implicit.backward(
        outer_loss=loss(validation),
        inner_loss=inner_loss(lam, train),
        params=model.parameters(),
        hparams=[lam],
        solver=solver,
        x0=adjoint,
    )
    optimizer.step()
    adjoint, solved = result.adjoint, result.solution
    residuals = (solved.trace[0] / solved.rhs_norm, solved.relative_residual, result.inner_residual)
    for curve, value in zip(curves.values(), (result.outer_value, loss(test), *residuals), strict=True):
        curve.append(value.item())

strengths = {"untuned": untuned, "best single strength": single, "per pixel and class": lam.detach()}
columns = {"validation": (train, validation), "test": (train, test), "test, refitted": (both, test)}
table = {name: {part: score(lam, *rows) for part, rows in columns.items()} for name, lam in strengths.items()}
report = {"configuration": config, "table": table, "curves": curves, "seconds": time.perf_counter() - started}
args.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
print(f"\n{'loss and accuracy':20}" + "".join(f"{part:>20}" for part in columns))
for name, row in table.items():
    print(f"{name:20}" + "".join(f"{part['loss']:11.4f}{part['accuracy']:9.2%}" for part in row.values()))
worst = [max(curves[name], default=0.0) for name in ("inner problem", "adjoint")]
print(f"refitted: with the same strengths, on train and validation rows\n\n{report['seconds']:.1f} s with {config}")
print("largest residuals: inner problem ‖∇g‖ = {:.1e}, adjoint ‖b − Av‖ / ‖b‖ = {:.1e}".format(*worst))

figure = Figure(figsize=(10, 8), layout="constrained")
left, right, maps = figure.subplot_mosaic("LR;MM").values()
for part, colour in (("validation", "C0"), ("test", "C1")):
    left.plot([*curves[part], table["per pixel and class"][part]["loss"]], c=colour, label=f"{part}, 640 strengths")
    left.axhline(table["best single strength"][part]["loss"], c=colour, ls="--", label=f"{part}, best single strength")
left.set(title="Loss while 640 strengths are tuned", xlabel="outer step", ylabel="cross-entropy (nats)", ylim=0)
for name in list(curves)[2:]:
    right.semilogy(curves[name], label=name)
right.set(title="Residuals of each hypergradient", xlabel="outer step", ylabel="adjoint ‖b − Av‖ / ‖b‖, inner ‖∇g‖")
tiles = pad((lam.detach() - untuned).exp().log10().reshape(2, 5, 8, 8), (0, 1, 2, 0), value=float("nan"))
shown = maps.imshow(tiles.permute(0, 2, 1, 3).reshape(20, 45)[:, :-1].numpy(), "RdBu_r", vmin=-1, vmax=1)
for digit in range(10):
    maps.text(9 * (digit % 5) + 3.5, 10 * (digit // 5) + 1, f"class {digit}", ha="center")
maps.set(title="Tuned strengths: red pixels are regularised more, blue less", frame_on=False, xticks=[], yticks=[])
figure.colorbar(shown, ax=maps, label="log₁₀ (tuned / untuned)")
left.legend()
right.legend()
figure.savefig(args.output, dpi=120)
