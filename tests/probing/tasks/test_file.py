"""Tasks from files: what is read, and that each mistake is named with its line and its remedy."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.probing.tasks import FileTask, file_task

ROW = {"question": "Who wrote Emma?", "answers": ["Jane Austen", "Austen"]}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(folder: Path, *rows: object, name: str = "books.jsonl") -> Path:
    return written(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def test_jsonl(tmp_path: Path) -> None:
    second = {"question": "B?", "answers": ["b"], "wrong_answers": ["c", "d"], "group": "g", "source": "not read"}
    task = file_task(jsonl(tmp_path, ROW, second))
    assert (task.name, task.rules) == ("books", "substring/1")
    assert task.questions == (
        Question(0, "Who wrote Emma?", ("Jane Austen", "Austen"), (), "Who wrote Emma?"),
        Question(1, "B?", ("b",), ("c", "d"), "g"),
    )
    assert task.judge(task.questions[1], "It is C.") == Judgement(False, "C")


def test_csv(tmp_path: Path) -> None:
    content = (
        "id,question,answers,wrong_answers,group\r\n"
        '1,"Who, of all, wrote ""Emma""?","[""Jane Austen"", ""Austen""]",Dickens,\r\n'
        "\r\n"
        '2,"Two\nlines?",one string,,g\r\n'
    )
    task = file_task(written(tmp_path, "books.csv", content))
    assert task.questions == (
        Question(
            0, 'Who, of all, wrote "Emma"?', ("Jane Austen", "Austen"), ("Dickens",), 'Who, of all, wrote "Emma"?'
        ),
        Question(1, "Two\nlines?", ("one string",), (), "g"),
    )


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    as_jsonl = file_task(written(tmp_path, "a.jsonl", bom + json.dumps(ROW).encode()))
    as_csv = file_task(
        written(tmp_path, "a.csv", bom + b'question,answers\nWho wrote Emma?,"[""Jane Austen"",""Austen""]"')
    )
    assert as_jsonl.questions == as_csv.questions


def test_repeated_questions_share_a_group(tmp_path: Path) -> None:
    task = file_task(jsonl(tmp_path, ROW, {"question": "B?", "answers": ["b"]}, ROW))
    assert [q.group for q in task.questions] == ["Who wrote Emma?", "B?", "Who wrote Emma?"]
    assert [q.index for q in task.questions] == [0, 1, 2]


def test_limit_takes_the_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"question": f"{i}?", "answers": ["a"]} for i in range(5)))
    assert [q.question for q in file_task(path, 2).questions] == ["0?", "1?"]
    assert len(file_task(path, 99).questions) == 5
    with pytest.raises(BadInputError, match="limit is 0"):
        file_task(path, 0)


def test_the_digest_is_of_the_questions_and_not_of_the_file(tmp_path: Path) -> None:
    def task(*rows: object, name: str = "a.jsonl") -> FileTask:
        return file_task(jsonl(tmp_path, *rows, name=name))

    first = task(ROW)
    assert len(first.digest) == 64
    assert task({**ROW, "comment": 1}, name="b.jsonl").digest == first.digest
    others = [
        task({**ROW, "question": "Who?"}),
        task({**ROW, "answers": ["Jane Austen"]}),
        task({**ROW, "wrong_answers": ["Dickens"]}),
        task({**ROW, "group": "g"}),
        task(ROW, ROW),
        task({**ROW, "answers": ["Jane Austen Austen"]}),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 7


# The fingerprint of a known file. It goes into captures, so that it may not change by itself.
def test_the_digest_is_frozen(tmp_path: Path) -> None:
    path = jsonl(tmp_path, ROW, {"question": "東?", "answers": ["日本"], "wrong_answers": ["x"], "group": "g"})
    assert file_task(path).digest == "d4455d02c741ac0d617353a2583069a65bb503bae77decbe77fdba1ade96d8a2"


JSONL_MISTAKES = [
    ("", "books.jsonl: the file has no question"),
    ("\n \n", "no question"),
    ('{"question": "a"\n', "line 1: not JSON at column"),
    (json.dumps(ROW) + "\nfoo\n", "line 2: not JSON at column 1"),
    ("[1]\n", "line 1: found a list: expected an object"),
    ('"a"\n', "line 1: found a string"),
    ("null\n", "line 1: found null"),
    ('{"answers": ["a"]}', r"line 1: question is missing \(found answers\)"),
    ('{"question": "a", "answer": ["a"]}', r"line 1: answers is missing \(found question, answer\)"),
    ("{}", r"question is missing \(found nothing\)"),
    ('{"question": 3, "answers": ["a"]}', "line 1: question is a number: expected a string"),
    ('{"question": null, "answers": ["a"]}', "question is null"),
    ('{"question": " ", "answers": ["a"]}', "question is empty"),
    ('{"question": "a", "answers": "b"}', "answers is a string: expected a list of strings"),
    ('{"question": "a", "answers": {"b": 1}}', "answers is an object"),
    ('{"question": "a", "answers": []}', "answers is empty"),
    ('{"question": "a", "answers": ["b", true]}', r"answers\[1\] is true or false"),
    ('{"question": "a", "answers": ["b", ""]}', r"answers\[1\] is empty"),
    ('{"question": "a", "answers": ["b"], "wrong_answers": "c"}', "wrong_answers is a string"),
    ('{"question": "a", "answers": ["b"], "wrong_answers": ["B"]}', "'b' is both in answers and in wrong_answers"),
    ('{"question": "a", "answers": ["b"], "group": 1}', "group is a number"),
    ('{"question": "a", "answers": ["b"], "group": ""}', "group is empty"),
    ('{"question": "a\\ud800", "answers": ["b"]}', "half of a surrogate pair"),
    (b'{"question": "\xff", "answers": ["b"]}', r"line 1: byte 15 is 0xff, which is not UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), JSONL_MISTAKES)
def test_mistakes_in_jsonl(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as error:
        file_task(written(tmp_path, "books.jsonl", content))
    assert "books.jsonl" in str(error.value)


CSV_MISTAKES = [
    ("", "no question"),
    ("question,answers\n", "no question"),
    ("question;answers\na;b\n", r"line 1: question is missing \(found question;answers\)"),
    ("question,answer\na,b\n", r"line 1: answers is missing \(found question, answer\)"),
    ("question,answers,question\na,b,c\n", "line 1: a column is named twice"),
    ("question,answers\na,b,c\n", r"line 2: found 3 cells: expected 2 \(question, answers\)"),
    ("question,answers\na\n", "line 2: found 1 cells"),
    ("question,answers\na,b\na,\n", r"line 3: answers is missing \(found question\)"),
    ('question,answers\na,"[""b"""\n', "line 2: answers starts with .* but is not a JSON list"),
    ('question,answers\na,"[1]"\n', r"line 2: answers\[0\] is a number"),
    ('question,answers\na,"[]"\n', "line 2: answers is empty"),
    ('question,answers\n"two\nlines",b\n"a,b\n', "line 4: not CSV"),
    ("question,answers\r\na,b\rc,d", "line 2: not CSV"),
    (b"question,answers\na,b\n\xe9,c\n", "line 3: byte 1 is 0xe9"),
]


@pytest.mark.parametrize(("content", "message"), CSV_MISTAKES)
def test_mistakes_in_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as error:
        file_task(written(tmp_path, "books.csv", content))
    assert "books.csv" in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such file"):
        file_task(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(BadInputError, match="no such file"):
        file_task(tmp_path / "folder.csv")
    with pytest.raises(BadInputError, match=r"ends in \.jsonl or \.csv"):
        file_task(written(tmp_path, "a.txt", "x"))


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(str.strip)
rows = st.lists(
    st.fixed_dictionaries({"question": text, "answers": st.lists(text, min_size=1, max_size=3)}), min_size=1
)


@given(rows)
def test_both_formats_say_the_same(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("both")
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["question", "answers"])
    writer.writerows([row["question"], json.dumps(row["answers"])] for row in rows)
    a = file_task(jsonl(folder, *rows))
    b = file_task(written(folder, "books.csv", out.getvalue()))
    assert a == b
    assert [q.question for q in a.questions] == [row["question"] for row in rows]
