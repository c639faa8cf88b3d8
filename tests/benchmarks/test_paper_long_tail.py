"""The experiments on long-tailed CIFAR-10: the loader, a run, the tables from end to end."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the experiments need the extra `torch`")

from benchmarks.data import cifar, images
from benchmarks.harness.claims import IN_PART, NOT_SUPPORTED, SUPPORTED
from benchmarks.paper.long_tail import problem as tail
from benchmarks.paper.long_tail import table4, table6
from benchmarks.paper.methods import IDENTITY, METHODS, NYSTROM, Minres
from tests.benchmarks.conftest import text, written
from tests.conftest import assert_picture

TINY = replace(
    tail.SMALL, network="cnn-2", largest=20, batch=8, inner_steps=6, outer_every=3,
    reference_steps=5, hidden=5,
)  # fmt: skip
PER_CLASS, OUTER = 12, 2


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A folder with few images: as npz, and the sizes that the loader asks for made small."""
    monkeypatch.setattr(cifar, "head_count", lambda c: PER_CLASS)
    monkeypatch.setattr(cifar, "PER_CLASS_VALIDATION", OUTER)
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    for name, count in (("train_head.npz", PER_CLASS), ("test.npz", 3)):
        labels = rng.permutation(np.repeat(np.arange(10), count)).astype(np.uint8)
        images = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        np.savez(folder / name, images=images, labels=labels)
    return tmp_path / "data"


def published(folder, images, labels, name):
    """Write images in the published binary form."""
    content = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    (folder / name).write_bytes(np.hstack([labels[:, None], content]).astype(np.uint8).tobytes())


def test_both_forms_of_the_files_hold_the_same_images(data_dir, tmp_path):
    cut = cifar.load_cifar(data_dir)
    assert cut.images.shape == (10 * PER_CLASS, 32, 32, 3)
    folder = tmp_path / "whole" / "cifar10"
    folder.mkdir(parents=True)
    # After the first of every class come others, which are left out.
    images = np.concatenate([cut.images, 255 - cut.images[:30]])
    labels = np.concatenate([cut.labels, cut.labels[:30]])
    for number, part in enumerate(np.array_split(np.arange(len(labels)), 5), 1):
        published(folder, images[part], labels[part], f"data_batch_{number}.bin")
    published(folder, cut.test_images, cut.test_labels, "test_batch.bin")
    whole = cifar.load_cifar(tmp_path / "whole")
    for name in ("images", "labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"data_batch_1\.bin.*train_head\.npz.*uint8"):
        table4.main(["--quick", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 3, 32, 32), np.uint8)}, r"shape \(n, 32, 32, 3\)"),
        ({"images": np.zeros((120, 32, 32, 3))}, "must be uint8"),
        ({"labels": np.zeros(120)}, "must be 120 integers"),
        ({"labels": np.full(120, 10)}, r"labels must lie in 0…9"),
        ({"labels": np.zeros(120, int)}, "must hold 12 of class 0; found 120"),
        ({"labels": None}, "labels is not a file"),
    ],
)
def test_wrong_arrays_are_refused(data_dir, change, message):
    path = data_dir / "cifar10" / "train_head.npz"
    with np.load(path) as content:
        arrays = dict(content) | change
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(SystemExit, match=message):
        cifar.load_cifar(data_dir)


def test_a_file_cut_short_is_refused(data_dir):
    folder = data_dir / "cifar10"
    (folder / "test.npz").unlink()
    for name in cifar.PUBLISHED:
        (folder / name).write_bytes(bytes(3072))
    with pytest.raises(SystemExit, match="records of 3073 bytes; it has 3072"):
        cifar.load_cifar(data_dir)


def test_long_tailed_sets_fall_by_the_imbalance_and_leave_the_balanced_one_out():
    heads = [cifar.head_count(c) for c in range(10)]
    assert (heads[0], heads[9], sum(heads)) == (5000, 300, 15796)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), heads))
    outer = cifar.balanced(labels)
    assert np.bincount(labels[outer]).tolist() == [100] * 10
    for imbalance in cifar.IMBALANCES:
        chosen = cifar.long_tailed(labels, imbalance)
        counts = np.bincount(labels[chosen])
        assert counts[0] == 4900 and counts[9] == 5000 // imbalance
        np.testing.assert_allclose(
            counts[1:-1], 5000 * imbalance ** (-np.arange(1, 9) / 9), atol=1.0
        )
        assert len(np.unique(chosen)) == len(chosen)
        assert not np.intersect1d(chosen, outer).size
    few = np.bincount(labels[cifar.long_tailed(labels, 50, 1000)])
    assert (few[0], few[9]) == (1000, 20)


def test_shrinking_averages_squares():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[0, :2, :2, 0] = [[10, 20], [30, 40]]
    small = cifar.shrink(images, 2)
    assert small.shape == (1, 2, 2, 3) and small[0, 0, 0].tolist() == [25, 0, 0]
    assert small.sum() == 25
    with pytest.raises(ValueError, match="must divide 4; got 3"):
        cifar.shrink(images, 3)


def test_the_cache_is_made_anew_for_other_files(data_dir, tmp_path):
    def load():
        found = cifar.load_small(data_dir, tmp_path / "cache", 16)
        return found, (tmp_path / "cache" / "cifar10-16.npz").stat().st_mtime_ns

    data, first = load()
    np.testing.assert_array_equal(data.labels, cifar.load_cifar(data_dir).labels)
    assert data.images.shape == (120, 16, 16, 3)
    again, second = load()
    assert second == first
    np.testing.assert_array_equal(again.images, data.images)
    with (data_dir / "cifar10" / "test.npz").open("ab") as file:
        file.write(b"\0")
    assert load()[1] != first


@pytest.fixture
def problem(data_dir, tmp_path):
    """Make a problem with few images, settings changed."""
    folders = str(data_dir), str(tmp_path)
    return lambda seed=0, **changes: tail.Reweighting(
        replace(TINY, **changes), folders, 50, seed, "cpu"
    )


def test_every_method_sees_the_same_batches_and_starts_from_equal_weights(problem):
    left, right = problem(), problem()
    left.inner_step()
    left.hypergradient(tail.solvers(2)[IDENTITY], 0, left.outer_batch())
    left.inner_step()
    for _ in range(2):
        right.inner_step()
    assert torch.equal(left.x, right.x)
    found = right.model.state_dict()
    for name, value in left.model.state_dict().items():
        assert torch.equal(value, found[name])  # running statistics too
    assert left.weights() == [0.5] * len(tail.LOSSES)
    other = problem(seed=1)
    other.inner_step()
    assert not torch.equal(other.x, right.x)


def test_an_outer_step_lowers_the_outer_loss_by_the_weights_alone(problem):
    tested = problem(outer_rate=0.1)
    tested.inner_step()
    before = {name: value.clone() for name, value in tested.model.state_dict().items()}
    tested.outer_step(tested.hypergradient(tail.solvers(2)[NYSTROM], 0, tested.outer[:]))
    assert tested.weights() != [0.5] * len(tail.LOSSES)
    for name, value in tested.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_every_image_comes_once_before_any_comes_again():
    stream = images.batches(10, 3, torch.Generator().manual_seed(0))
    first = torch.cat([next(stream) for _ in range(3)])
    assert len(set(first.tolist())) == 9  # what is left of a round is left out
    assert len(next(images.batches(2, 3, torch.Generator()))) == 2


def test_the_cosine_of_nothing_is_zero():
    u = torch.tensor([3.0, 4.0])
    assert tail.cosine(u, torch.tensor([4.0, 3.0])) == pytest.approx(0.96)
    assert tail.cosine(u, torch.zeros(2)) == 0.0


def test_accuracy_is_that_of_the_classes(problem):
    tested = problem()
    linear = tested.model[-1]
    torch.nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(torch.eye(10)[3])
    assert tested.accuracy(tested.test) == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_augmentation_shifts_and_mirrors():
    x = torch.arange(2 * 3 * 12 * 12, dtype=torch.float32).reshape(2, 3, 12, 12)
    seen = set()
    for seed in range(20):
        found = images.augmented(x, torch.Generator().manual_seed(seed))
        assert found.shape == x.shape
        middle = found[:, :, 5:7, 5:7]
        for image, source in zip(middle, x, strict=True):
            assert set(image.ravel().tolist()) <= set(source.ravel().tolist())
        step = found[0, 0, 6, 6] - found[0, 0, 6, 5]
        seen.add(step.item())
    assert seen == {1.0, -1.0}


@pytest.mark.parametrize("network", ["wrn-10-1", "cnn-4"])
def test_networks_are_leaky_and_evaluate_by_running_statistics(network):
    model, _ = tail.build(replace(TINY, network=network), seed=0)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())
    again, _ = tail.build(replace(TINY, network=network), seed=0)
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def test_minres_solves_an_indefinite_system():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    A = torch.from_numpy(Q @ np.diag([-2.0, -1, 1, 2, 3, 4]) @ Q.T)
    b = torch.from_numpy(rng.standard_normal(6))
    solution = Minres(0.5, 20, rtol=1e-10).prepare(A).solve(b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(A + 0.5 * torch.eye(6), b))


def test_claims_follow_the_scores():
    def scores(nystrom, rival, baseline):
        rows = {method: [rival, rival] for method in METHODS}
        rows |= {method: [baseline] * 2 for method in [table4.BASELINE, *table4.FIXED]}
        rows[table4.PAPER_NYSTROM] = [nystrom, nystrom]
        return dict.fromkeys(table4.IMBALANCES, rows)

    def verdicts(*values):
        return [found["verdict"] for found in table4.judge(scores(*values))]

    assert verdicts(0.7, 0.6, 0.5) == [SUPPORTED, SUPPORTED]
    assert verdicts(0.6, 0.6, 0.6) == [SUPPORTED, NOT_SUPPORTED]
    assert verdicts(0.5, 0.6, 0.5) == [NOT_SUPPORTED, NOT_SUPPORTED]

    def grid(values):
        cells = {cell: [0.6, 0.6] for cell in table6.PAPER if cell != table6.BASELINE}
        return [found["verdict"] for found in table6.judge("", cells | values, [0.5, 0.5])]

    assert grid({}) == [SUPPORTED, SUPPORTED]
    assert grid({(5, 0.1): [0.4, 0.4]}) == [IN_PART, IN_PART]


@pytest.mark.parametrize(("module", "count"), [(table4, 11), (table6, 10)])
def test_a_table_from_end_to_end_and_again_without_running(
    module, count, data_dir, tmp_path, monkeypatch, calls
):
    name = module.main.name
    monkeypatch.setattr(tail, "SMALL", TINY)
    monkeypatch.setattr(table4, "IMBALANCES", (50,))
    paper = {method: {50: (0.5, 0.1)} for method in table4.PAPER}
    monkeypatch.setattr(table4, "PAPER", paper)
    arguments = ["--quick", "--data-dir", str(data_dir), "--output", str(tmp_path / "out")]
    arguments += ["--seeds", "1", "--workers", "1"]
    assert module.main(arguments) == 0
    assert len(calls) == count
    lines = text(tmp_path / "out", name)
    assert "0.50 ± 0.10" in lines or "0.75 ± 0.03" in lines
    assert "cnn-2" in lines and "→" in lines and "nan" not in lines
    content = written(tmp_path / "out", name)
    assert {"paper", "ours", "verdict"} == set(content["claims"][0])
    assert_picture(tmp_path / "out" / f"{name}.png")
    calls.clear()
    assert module.main(arguments) == 0
    assert not calls
    assert text(tmp_path / "out", name) == lines
