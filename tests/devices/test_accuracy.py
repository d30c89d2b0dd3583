import weakref

import numpy as np
import pytest
from PIL import Image

from edgeattn.data.source import IterableSource, open_source
from edgeattn.devices.accuracy import evaluate, pair_accuracy
from edgeattn.errors import DataError, NumericError, UsageError

NAMES = ("dark", "dim", "light", "white")


@pytest.fixture
def run(preprocessing, make_session, brightness):
    """evaluate() of a float32 session and a quantized one with these logits."""

    def evaluate_with(data, quantized=brightness, **options):
        sessions = {"float32": make_session("float32"), "quantized": make_session("quantized", logits=quantized)}
        names = {"input_name": "image", "output_name": "logits"}
        return evaluate(sessions, open_source(data), preprocessing, **{**names, **options})

    return evaluate_with


def test_same_answers_lose_nothing_but_the_interval_stays_wide(run, labelled_images):
    results = run(labelled_images(20))
    quantized = results["quantized"]
    assert (quantized.images, quantized.top1, quantized.agreement, quantized.cosine) == (20, 100, 100, pytest.approx(1))
    assert quantized.paired.drop_points == 0 and quantized.paired.retained == 1 and quantized.paired.mcnemar_p == 1
    assert quantized.paired.retained_interval.low < 0.9
    assert results["float32"].paired is None and results["float32"].sqnr_db is None


def test_losses_are_counted_by_image_and_by_class(run, labelled_images, brightness):
    def wrong_when_white(batch):
        logits = brightness(batch)
        logits[batch.mean(axis=(1, 2, 3)) > 0.75, 0] = 99
        return logits

    result = run(labelled_images(40), wrong_when_white, class_names=NAMES)["quantized"]
    assert result.paired.lost == 10 and result.paired.gained == 0 and result.paired.drop_points == 25
    assert result.paired.mcnemar_p == pytest.approx(2 / 2**10)
    assert {c.name: c.top1 for c in result.per_class} == {"dark": 100, "dim": 100, "light": 100, "white": 0}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(run, labelled_images, brightness, batch_size):
    def noisy(batch):
        return brightness(batch, shift=0.03)

    images = labelled_images(30)
    one, many = (run(images, noisy, batch_size=size)["quantized"].to_dict() for size in (1, batch_size))
    assert one.pop("sqnr_db") == pytest.approx(many.pop("sqnr_db")) and one.pop("cosine") == pytest.approx(
        many.pop("cosine")
    )
    assert one == many


def test_without_labels_agreement_and_noise_remain(run, labelled_images):
    result = run([image for image, _ in labelled_images(12)])["quantized"]
    assert result.top1 is None and result.paired is None and result.per_class == ()
    assert result.agreement == 100 and result.agreement_interval.low < 80 and result.sqnr_db == 200


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_output_names_session_and_image(run, labelled_images, brightness, value):
    def broken(batch):
        logits = brightness(batch)
        logits[batch.mean(axis=(1, 2, 3)) > 0.5, 1] = value
        return logits

    with pytest.raises(NumericError, match=r"session quantized gives 1 NaN or infinite of 4 logits for image .*\[2\]"):
        run(labelled_images(4), broken, batch_size=4)


def test_folder_classes_are_found_by_name(run, image_folder):
    # Sorted as folders: light, white; the model's outputs 2 and 3.
    folder = image_folder({"white": [200, 250], "light": [130, 180]})
    result = run(folder, class_names=NAMES)["float32"]
    assert result.top1 == 100 and [c.name for c in result.per_class] == ["light", "white"]


def test_unknown_folder_lists_both_sides_and_the_way_out(run, image_folder):
    with pytest.raises(DataError) as caught:
        run(image_folder({"white": [250], "cat": [10]}), class_names=NAMES)
    assert "'cat'" in str(caught.value) and "'dark', 'dim', 'light', 'white'" in str(caught.value)
    assert "Rename the folders" in str(caught.value)


def test_some_folders_without_model_names_are_not_guessed(run, image_folder):
    with pytest.raises(DataError, match=r"2 classes .* 4 outputs and no class names"):
        run(image_folder({"a": [10], "b": [250]}))


def test_all_folders_without_model_names_go_by_order(run, image_folder):
    folder = image_folder({"a": [10], "b": [100], "c": [150], "d": [250]})
    assert run(folder)["float32"].top1 == 100


def test_numbers_whose_order_is_ambiguous_are_not_guessed(run, image_folder):
    with pytest.raises(DataError, match="order as text differs"):
        run(image_folder({"1": [10], "2": [100], "3": [150], "10": [250]}))


def test_a_name_of_two_outputs_is_refused_unless_the_lists_are_equal(run, image_folder, labelled_images):
    twice = ("crane", "crane", "light", "white")
    with pytest.raises(DataError, match="several outputs of the model are called 'crane'"):
        run(image_folder({"crane": [10]}), class_names=twice)
    source = IterableSource(labelled_images(8))
    source.class_names = twice
    assert run(source, class_names=twice)["float32"].top1 == 100


@pytest.mark.parametrize("label", [-1, 4])
def test_label_out_of_range_names_the_image(run, labelled_images, label):
    images = [*labelled_images(3), (labelled_images(1)[0][0], label)]
    with pytest.raises(DataError, match=rf"\[3\] has label {label}; expected 0 to 3"):
        run(images)


def test_a_missing_label_names_the_image(run, labelled_images):
    with pytest.raises(DataError, match=r"\[2\] has no label"):
        run([*labelled_images(2), labelled_images(1)[0][0]])


def test_limit_spreads_over_a_sorted_source(run, labelled_images):
    result = run(open_source(labelled_images(40)).spread(8), class_names=NAMES)["float32"]
    assert result.images == 8 and [c.images for c in result.per_class] == [2, 2, 2, 2]


def test_progress_counts_images(run, labelled_images):
    told = []
    run(labelled_images(5), batch_size=2, progress=lambda *step: told.append(step))
    assert told == [("accuracy", 2, 5), ("accuracy", 4, 5), ("accuracy", 5, 5)]


@pytest.mark.parametrize(
    ("quantized", "text"),
    [
        (lambda batch: batch, "expected .* classes"),
        (lambda batch: np.zeros((len(batch), 3)), "3 classes and the reference"),
    ],
    ids=["not logits", "other model"],
)
def test_outputs_that_do_not_fit_are_refused(run, labelled_images, quantized, text):
    with pytest.raises(UsageError, match=text):
        run(labelled_images(2), quantized)


def test_missing_output_lists_what_there_is(run, labelled_images):
    with pytest.raises(UsageError, match="gives logits; expected an output named 'scores'"):
        run(labelled_images(2), output_name="scores")


def test_memory_does_not_keep_images(run):
    """One picture is alive at a time: the source makes them on demand and the evaluation drops them."""
    alive = []

    class Pictures:
        def __len__(self):
            return 20

        def __iter__(self):
            for level in range(20):
                image = Image.new("RGB", (6, 6), (level, level, level))
                alive.append(weakref.ref(image))
                yield image
                del image
                assert sum(ref() is not None for ref in alive) <= 4

    run(Pictures())
    assert len(alive) >= 20


def test_reference_never_right_retains_nothing():
    paired = pair_accuracy(np.zeros(5, bool), np.array([1, 0, 0, 0, 0], bool))
    assert paired.retained is None and paired.gained == 1 and paired.drop_points == -20
