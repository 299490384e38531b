"""The state is saved, loaded and moved; a run that is killed at any step and resumed gives the same numbers."""

import copy
import io
import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

import bilevel_programs as programs
import hypergrad as hg
from bilevel_programs import KINDS, Program, backward, make, numbers, optimizers, train

B = hg.bilevel


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(tracker, program, optims):
    grads = [x.grad for x in program.tensors()]
    return through_a_file(
        {
            "tracker": tracker.state_dict(),
            "model": program.model.state_dict(),
            "decay": program.decay.detach(),
            "grads": grads,
            "optims": [each.state_dict() for each in optims],
            "random": torch.get_rng_state(),
        }
    )


def resumed(name, state, tracker_of=make, **options):
    p = Program()
    for x in p.tensors():
        x.data.zero_()
    p.model.load_state_dict(state["model"])
    with torch.no_grad():
        p.decay.copy_(state["decay"])
    for x, g in zip(p.tensors(), state["grads"], strict=True):
        x.grad = g
    tracker, optims = tracker_of(name, p, **options), optimizers(p)
    for each, kept in zip(optims, state["optims"], strict=True):
        each.load_state_dict(kept)
    tracker.load_state_dict(state["tracker"])
    torch.set_rng_state(state["random"])
    return tracker, p, optims


@pytest.mark.parametrize("kill", [0, 1, 2, 5])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(name, kill):
    """It is killed between two steps (if `kill` is even), or in the middle of an accumulation."""
    results = []
    for killed in (False, True):
        p = Program()
        tracker, optims, done = make(name, p), optimizers(p), 0
        for step in range(7):
            for part in range(2):
                if killed and done == 2 * kill + kill % 2:
                    tracker, p, optims = resumed(name, saved(tracker, p, optims))
                backward(name, tracker, p, step + part)
                done += 1
            for each in (*optims, tracker):
                each.step()
            for each in optims:
                each.zero_grad()
        results.append(numbers(tracker, p))
        report = tracker.report()
        results.append(torch.tensor([report.step, report.skipped, *report.evaluations.values()]))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("name", KINDS)
def test_two_trackers_of_one_state_do_not_share_memory(name):
    p = Program()
    first, optims = make(name, p), optimizers(p)
    train(name, first, p, range(3), optims)
    backward(name, first, p, 3)
    q = copy.deepcopy(p)
    q.decay = q.decay.detach().requires_grad_()
    second = make(name, q)
    second.load_state_dict(first.state_dict())
    for x in (*p.tensors(), *q.tensors()):
        x.grad = None
    before = copy.deepcopy(second.state_dict())
    backward(name, first, p, 4)
    first.step()
    backward(name, first, p, 5)
    first.step()
    assert equal(before, second.state_dict())


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("own", [True, False])
def test_the_random_restarts_of_page_continue_after_loading(own):
    """The tracker draws from its generator= or from torch's random state."""

    def page(name, program, calls):
        def full():
            calls.append(tracker.steps)
            return programs.full(program)()

        generator = torch.Generator().manual_seed(5) if own else None
        tracker = B.SRBA(
            program.model.parameters(), [program.decay], full=full, probability=0.3, generator=generator, lr=0.1
        )
        return tracker

    def run(kill):
        torch.manual_seed(1)
        p, calls = Program(), []
        tracker, optims = page("SRBA", p, calls), optimizers(p)
        for step in range(30):
            if step == kill:
                tracker, p, optims = resumed("SRBA", saved(tracker, p, optims), page, calls=calls)
            train("SRBA", tracker, p, range(step, step + 1), optims)
        return calls, numbers(tracker, p)

    whole, parts = run(None), run(11)
    assert whole[0] == parts[0] and torch.equal(whole[1], parts[1])


def test_tables_in_files_are_tables(tmp_path):
    p, q = Program(), Program()
    plain, mapped = make("SABA", p), make("SABA", q, file=str(tmp_path / "table"), budget=10)
    assert torch.equal(train("SABA", plain, p, range(6)), train("SABA", mapped, q, range(6)))
    files = sorted(tmp_path.iterdir())
    size = sum(x.numel() for x in q.model.parameters())
    assert len(files) == 5  # of inner batches ∇₁g, Hv and the cross product, of outer ones ∇₁f and ∇₂f
    count = programs.BATCHES * (3 * size + 2 * len(q.decay)) + programs.BATCHES * size * 0
    assert sum(file.stat().st_size for file in files) == 8 * count
    mapped.to("cpu")
    state = through_a_file(mapped.state_dict())
    other = make("SABA", q, file=str(tmp_path / "other"), budget=10)
    other.load_state_dict(state)
    assert equal(other.state_dict(), mapped.state_dict())
    assert torch.equal(train("SABA", plain, p, range(6, 9)), train("SABA", other, q, range(6, 9)))


def test_a_state_that_does_not_fit():
    p = Program()
    state = make("SOBA", p).state_dict()
    with pytest.raises(ValueError, match="state of SOBA, and this tracker is F2SA"):
        make("F2SA", p).load_state_dict(state)
    with pytest.raises(ValueError, match=r"other filters \(\[\] instead of \['average'\]\)"):
        make("MA-SOBA", p).load_state_dict(state)
    with pytest.raises(ValueError, match="does not fit this tracker: variables of shapes"):
        B.SOBA(p.model[0].parameters(), [p.decay]).load_state_dict(state)
    saba = make("SABA", p).state_dict()
    other = B.SABA(p.model.parameters(), [p.decay], batches=(4, 2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="a table of 4 batches, and this tracker one of 2"):
        other.load_state_dict(saba)
    assert equal(before, other.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_moving_to_where_it_is_changes_nothing(name):
    """The move comes in the middle of an accumulation."""
    results = []
    for move in (False, True):
        p = Program()
        tracker, optims = make(name, p), optimizers(p)
        for step in range(4):
            backward(name, tracker, p, step)
            assert not move or tracker.to("cpu") is tracker
            train(name, tracker, p, range(step + 1, step + 2), optims)
        results.append(numbers(tracker, p))
    assert torch.equal(*results)


# Loaders


class Rows(Dataset):
    """Rows (x, class, index) with noise that is drawn when a row is read."""

    def __init__(self, noise=0.0):
        program, self.noise = Program(), noise
        self.x, self.y = program.x.reshape(-1, programs.FEATURES), program.y.reshape(-1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise * torch.randn(programs.FEATURES, dtype=torch.float64), self.y[i], i


def loaders(shuffle, workers=0, context=None, noise=0.0):
    """A training and a validation loader; `shuffle` says whether torch, the loader or its sampler draws the order."""
    made = []
    for seed in (3, 4):
        options = {"batch_size": 5}
        if seed == 3 and workers:
            options |= {"num_workers": workers, "multiprocessing_context": context}
        data, generator = Rows(noise), torch.Generator().manual_seed(seed)
        own = {
            "no": {},
            "torch": {"shuffle": True},
            "loader": {"shuffle": True, "generator": generator},
            "sampler": {"sampler": RandomSampler(data, generator=generator)},
            "weighted": {"sampler": WeightedRandomSampler([1.0] * len(data), len(data), generator=generator)},
        }[shuffle]
        made.append(B.cycle(DataLoader(data, **own, **options)))
    return made


def loop(kill, steps, **kind):
    """Train over the loaders with dropout, which draws from the random state between batches too."""
    torch.manual_seed(0)
    p = Program()
    tracker, optims, (inner, outer), seen = make("SOBA", p), optimizers(p), loaders(**kind), []
    for step in range(steps):
        if step == kill:
            state = saved(tracker, p, optims)
            data = through_a_file([inner.state_dict(), outer.state_dict()])
            del inner, outer
            inner, outer = loaders(**kind)
            for each, kept in zip((inner, outer), data, strict=True):
                each.load_state_dict(kept)
            tracker, p, optims = resumed("SOBA", state)
        losses = []
        for batches in (outer, inner):
            x, y, index = next(batches)
            seen += index.tolist()
            hidden = torch.nn.functional.dropout(torch.tanh(p.model[0](x)), 0.2)
            losses.append(torch.nn.functional.cross_entropy(p.model[2](hidden), y))
        tracker.backward(losses[0], losses[1] + p.penalty())
        for each in (*optims, tracker):
            each.step()
        for each in optims:
            each.zero_grad()
    return seen, numbers(tracker, p)


SHUFFLES = ["no", "torch", "loader", "sampler", "weighted"]


@pytest.mark.parametrize("kill", [0, 1, 4, 5, 6, 11])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_loaders_go_on_after_a_kill(shuffle, kill):
    """A pass has five batches."""
    whole, parts = (loop(at, 12, shuffle=shuffle) for at in (None, kill))
    assert whole[0] == parts[0] and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("shuffle", ["no", "torch"])
def test_loaders_continue_the_random_numbers_of_the_main_process(shuffle):
    whole, parts = (loop(at, 8, shuffle=shuffle, noise=0.1) for at in (None, 3))
    assert whole[0] == parts[0] and torch.equal(whole[1], parts[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("context", "shuffle"), [("fork", "torch"), ("fork", "loader"), ("spawn", "loader")])
def test_loaders_with_workers_go_on_after_a_kill(context, shuffle):
    """Workers draw the noise, from seeds that the loader draws for each pass."""
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {context}")
    workers = 1 if context == "spawn" else 2  # a spawned one imports torch
    whole, parts = (loop(at, 4, shuffle=shuffle, workers=workers, context=context, noise=0.1) for at in (None, 2))
    assert whole[0] == parts[0] and torch.equal(whole[1], parts[1])


def test_cycle_says_what_it_cannot_go_through():
    with pytest.raises(TypeError, match="not an iterator"):
        B.cycle(iter([1, 2]))
    with pytest.raises(ValueError, match="the loader is empty"):
        next(B.cycle([]))
    batches = B.cycle([1, 2, 3])
    assert iter(batches) is batches
    assert [next(batches) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1] and batches.passes == 2


def test_every_pass_shuffles_anew_and_covers_everything():
    batches = B.cycle(DataLoader(Rows(), batch_size=6, shuffle=True))
    passes = [torch.cat([next(batches)[2] for _ in range(4)]) for _ in range(2)]
    assert all(sorted(each.tolist()) == list(range(24)) for each in passes) and not torch.equal(*passes)
