"""The exercises' grader: right answers pass, and what is written first is named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import solutions

import lesson.exercises
from custom_ops.testing.mistakes import MISTAKES
from lesson.exercises.check import EXERCISES, HINTS, main, verdict

ROOT = Path(__file__).parents[2]

RIGHT = [
    (1, "softmax"),
    (1, "softmax_with_J"),
    (2, "log_softmax"),
    (3, "cross_entropy"),
    (4, "batch"),
    (5, "last_layer"),
]
#: what the student is told: a part of the battery's sentence, and of the hint
WRONG = [
    (1, "softmax_diagonal", "element-wise product of v with the diagonal of J", "step 5"),
    (1, "softmax_over_rows", "sums over dimension 0", "step 3"),
    (1, "softmax_over_everything", "rows depend on each other", "step 3"),
    (1, "softmax_sign", "has the wrong sign", ""),
    (1, "softmax_upstream_forgotten", "is 0, though the result depends on it", "step 4"),
    (2, "log_softmax_transposed", "is J v; expected vᵀJ", "symmetric"),
    (2, "log_softmax_diagonal", "element-wise product of v with the diagonal of J", "step 5"),
    (2, "log_softmax_over_rows", "sums over dimension 0", "step 3"),
    (2, "log_softmax_upstream_taken_for_ones", "backward takes it for ones", "step 3"),
    (3, "cross_entropy_upstream_taken_for_ones", "backward takes it for ones", "step 3"),
    (3, "cross_entropy_upstream_summed", "through its sum alone", "step 13"),
    (3, "cross_entropy_mass_forgotten", "is wrong", "each row of Y adds up to 1"),
    (3, "cross_entropy_upstream_on_the_wrong_side", "must match the size", "shapes beside"),
    (4, "batch_without_the_mean", "the mean's factor 1/3 is missing", "step 13"),
    (4, "batch_mean_twice", "divided by 3, as a mean would be", "step 13"),
    (4, "batch_mean_over_the_entries", "divided by 4, as a mean would be", "step 13"),
    (4, "batch_upstream_taken_for_one", "backward takes it for ones", "step 3"),
    (4, "batch_sign", "has the wrong sign", ""),
    (5, "last_layer_dW_transposed", "a gradient of shape [5, 4]; expected [4, 5]", "step 14"),
    (5, "last_layer_W_transposed", "cannot be multiplied", "shapes beside"),
    (5, "last_layer_db_not_summed", "has the shape (3, 4) and belongs to (4,)", "step 14"),
    (5, "last_layer_db_of_one_row", "the gradient of input 2 (`b`) is wrong", ""),
    (5, "last_layer_mean_twice", "input 1 (`W`) is 0.333333 times the right one", "step 13"),
    (5, "last_layer_upstream_taken_for_one", "backward takes it for ones", "step 3"),
]


def answered(number, answer):
    """The exercise's Function with a backward in the place of the empty one."""
    written = EXERCISES[number].written()
    backward = staticmethod(getattr(solutions, answer))
    return type(written.__name__, (written,), {"backward": backward})


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_a_right_answer_passes(number, answer):
    right, words = verdict(number, answered(number, answer))
    assert right, words
    assert words.startswith(f"Exercise {number} is right")
    assert words.endswith("That was the last." if number == 5 else f"On to exercise {number + 1}.")


@pytest.mark.parametrize(("number", "answer", "sentence", "hint"), WRONG)
def test_a_wrong_answer_is_named(number, answer, sentence, hint):
    right, words = verdict(number, answered(number, answer))
    words = " ".join(words.split())
    assert not right
    assert sentence in words
    assert hint in words


@pytest.mark.parametrize("number", EXERCISES)
def test_every_exercise_is_empty_and_says_so(number, capsys):
    assert main([str(number)]) == 1
    told = capsys.readouterr().out
    assert told == f"Exercise {number} is not written yet: open {EXERCISES[number].path}\n"


@pytest.mark.parametrize("number", EXERCISES)
def test_every_exercise_states_its_shapes_and_its_command(number):
    task = EXERCISES[number].path.read_text()
    assert f"python -m lesson.exercises.check {number}\n" in task
    assert re.search(r"^    result  \(", task, re.M)
    assert task.count("raise NotImplementedError") == 1
    assert f"`{EXERCISES[number].module}`" in lesson.exercises.__doc__


def test_every_right_answer_is_beside_no_exercise():
    beside = "".join(path.read_text() for path in EXERCISES[1].path.parent.glob("*.py"))
    for line in ("keepdim=True) * ", "a * (v -", "(A - Y)", "d.T @ X", "dZ.T"):
        assert line not in beside.replace("Y / Y.sum(1, keepdim=True)", "")


def test_every_hint_is_for_a_mistake_that_the_battery_names():
    names = {mistake.name for mistake in MISTAKES} | {"gradient's shape", "backward raises"}
    assert set(HINTS) <= names


def test_an_answer_in_a_students_copy_is_graded_from_its_folder(tmp_path):
    (tmp_path / "lesson" / "exercises").mkdir(parents=True)
    for path in (ROOT / "lesson").glob("*.py"):
        (tmp_path / "lesson" / path.name).write_text(path.read_text())
    for path in EXERCISES[1].path.parent.glob("*.py"):
        text = path.read_text().replace(
            'raise NotImplementedError("∂C/∂z, made of a and v")',
            "return v * a * (1 - a)",
        )
        (tmp_path / "lesson" / "exercises" / path.name).write_text(text)
    command = [sys.executable, "-m", "lesson.exercises.check", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (1, "")
    assert "element-wise product" in done.stdout
    assert f"at {Path('lesson', 'exercises', 'ex1_softmax.py')}:" in done.stdout


def test_a_number_that_is_no_exercise_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["9"])
    assert ended.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_without_a_number_every_exercise_is_told(capsys):
    assert main([]) == 1
    assert len(capsys.readouterr().out.splitlines()) == len(EXERCISES)
