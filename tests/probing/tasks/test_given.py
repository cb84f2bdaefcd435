"""Given text: pairs and plain texts from a file, fed as they are."""

import json

import pytest

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Judgement
from hiddenlake.probing.tasks import load_task
from hiddenlake.probing.tasks.file import FileTask
from hiddenlake.probing.tasks.given import GivenTask, given_task


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def test_pairs(tmp_path):
    task = given_task(
        write(
            tmp_path / "pairs.jsonl",
            [
                {"prompt": "Who wrote Emma?", "answer": "Jane Austen.", "correct": True, "exact_answer": "Jane Austen"},
                {"prompt": "Who wrote Emma?", "answer": "Shelley.", "answers": ["Austen"], "group": "emma"},
                {"prompt": "And Dracula?", "answer": "Bram Stoker", "answers": ["Stoker"]},
            ],
        )
    )
    first, second, third = task.questions
    assert (first.question, first.given, first.group) == ("Who wrote Emma?", "Jane Austen.", "Who wrote Emma?")
    assert second.group == "emma" and [q.index for q in task.questions] == [0, 1, 2]
    assert task.judge(first, first.given) == Judgement(True, "Jane Austen")
    assert task.judge(second, second.given) == Judgement(False, None)
    assert task.judge(third, third.given) == Judgement(True, "Stoker")


def test_pairs_without_labels_are_neither_right_nor_wrong(tmp_path):
    task = given_task(write(tmp_path / "p.jsonl", [{"prompt": "Hi", "answer": "Hello."}]))
    assert task.judge(task.questions[0], "Hello.") == Judgement(None, None)


def test_plain_texts(tmp_path):
    task = given_task(
        write(tmp_path / "t.jsonl", [{"text": "Once."}, {"text": "Twice.", "correct": False, "group": "g"}])
    )
    assert [(q.question, q.given, q.group) for q in task.questions] == [("Once.", "", "Once."), ("Twice.", "", "g")]
    assert [task.judge(q, "").correct for q in task.questions] == [None, False]


def test_csv(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt,answer,correct\n"A, b?",yes,true\nC?,no,0\nD?,maybe,\n', "utf-8")
    task = given_task(path)
    assert [task.judge(q, q.given).correct for q in task.questions] == [True, False, None]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "no row"),
        ([{"prompt": "x"}], "line 1: found the columns prompt: expected prompt and answer, or text"),
        ([{"prompt": "x", "answer": "y"}, {"text": "z"}], "some rows are plain texts and some are pairs"),
        ([{"prompt": "x", "answer": "y", "correct": "perhaps"}], "line 1: correct is a string"),
        ([{"prompt": "x", "answer": "y", "exact_answer": "z"}], "line 1: exact_answer 'z' is not a part of the answer"),
        ([{"prompt": "x", "answer": ""}], "line 1: answer is empty"),
        ([{"text": 3}], "line 1: text is a number"),
    ],
)
def test_bad_files_are_refused(rows, sentence, tmp_path):
    with pytest.raises(BadInputError, match=sentence):
        given_task(write(tmp_path / "bad.jsonl", rows))


def test_the_columns_say_which_kind_of_file_it_is(tmp_path):
    asked = write(tmp_path / "a.jsonl", [{"question": "x", "answers": ["y"], "text": "t", "answer": "z"}])
    assert isinstance(load_task(asked), FileTask)
    assert isinstance(load_task(write(tmp_path / "b.jsonl", [{"text": "x"}, {"text": "y"}]), limit=1), GivenTask)
    assert isinstance(load_task(write(tmp_path / "c.jsonl", [{"prompt": "x", "answer": "y"}])), GivenTask)


def test_the_digest_depends_on_the_given_answer(tmp_path):
    digests = {
        given_task(write(tmp_path / f"{answer}.jsonl", [{"prompt": "x", "answer": answer}])).digest for answer in "yz"
    }
    assert len(digests) == 2
