"""The paper's tasks: rows of each file format, prompts to the letter, and what its judges say."""

import json

import pytest

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.probing.tasks.paper import DATA_SETS, paper_task

# Two rows of each data set in the format in which it is published, written for these tests.
NLI = 'For the statement, "It rains", does the hypothesis "{}" represent entailment, contradiction, or neutrality?'
FILES = {
    "triviaqa": [
        ("train.json", json.dumps({"Data": [
            {"Question": "What is the capital of Peru?", "Answer": {"Value": "Lima", "Aliases": ["City of Kings", "Lima"]}},
            {"Question": "Who wrote Emma?", "Answer": {"Value": "Jane Austen", "Aliases": ["Jane Austen", "Austen"]}},
        ]})),
        ("persona.json", json.dumps([
            {"question": "What is the capital of Peru?", "gold_answer": "Lima", "aliases": ["City of Kings", "Lima"]},
            {"question": "Who wrote Emma?", "gold_answer": "Jane Austen", "aliases": ["Jane Austen", "Austen"]},
        ])),
        ("test.jsonl", '{"question": "What is the capital of Peru?", "golden_answers": ["City of Kings", "Lima"]}\n'
                       '{"question": "Who wrote Emma?", "golden_answers": ["Jane Austen", "Austen"]}\n'),
        ("hub.jsonl", '{"question": "What is the capital of Peru?", "answer": {"aliases": ["City of Kings", "Lima"]}}\n'
                      '{"question": "Who wrote Emma?", "answer": {"aliases": ["Jane Austen", "Austen"]}}\n'),
    ],
    "movies": [("movie_qa_train.csv", "Question,Answer\nWho acted as Ann in the movie 'Snow'?, Eva Lind\n"
                                      "Who acted as Bob in the movie 'Snow'?,Max Ern\n")],
    "math": [("AnswerableMath.csv", "id,question,answer,answerable,category,relevant_ids,source\n"
              "1, Ann has 3 pens and buys 9 more. How many has she?,[12.0],True,,,SVAMP\n"
              "2,What is half of 5.5?,[2.75],True,,,GSM8K\n")],
    "winobias": [("winobias_dev.csv", "type,stereotype,pronoun,sentence,answer,incorrect_answer,q,q_instruct\n"
                  "1,pro,he,The clerk called the nurse because he was lost.,clerk,nurse,The pronoun 'he' refers to the,"
                  "Who does the pronoun 'he' refer to?\n"
                  "1,anti,she,The clerk called the nurse because she was lost.,clerk,nurse,The pronoun 'she' refers to the,"
                  "Who does the pronoun 'she' refer to?\n")],
    "winogrande": [("winogrande_train.csv", "Question,Answer,Wrong_Answer\n"
                    "Ann likes tea unlike Eva because _ sleeps badly. Who does the blank refer to in the sentence?,Eva,Ann\n"
                    "Ann likes tea unlike Eva because _ sleeps well. Who does the blank refer to in the sentence?,Ann,Eva\n")],
    "mnli": [("mnli_train.csv", "Question,Answer,Origin\n"
              + "".join('"{}",{},mnli\n'.format(NLI.format(h).replace('"', '""'), a)
                        for h, a in (("It is wet", "entailment"), ("It is dry", "contradiction"))))],
    "imdb": [("orig_train.tsv", 'Sentiment\tText\nNegative\t"So ""bad"", really."\nPositive\tA gem.\n'),
             ("imdb.csv", 'text,label\n"So ""bad"", really.",0\nA gem.,1\n')],
    "hotpotqa": [("hotpot_train_v1.1.json", json.dumps([
        {"question": "Which is older?", "answer": "Rome", "context": [["Rome", ["It is old. ", "Very."]], ["Bonn", ["Young."]]]},
        {"question": "Which is newer?", "answer": "Bonn", "context": [["Bonn", ["Young."]]]},
    ])), ("hub.jsonl",
        '{"question": "Which is older?", "answer": "Rome", '
        '"context": {"title": ["Rome", "Bonn"], "sentences": [["It is old. ", "Very."], ["Young."]]}}\n'
        '{"question": "Which is newer?", "answer": "Bonn", "context": {"title": ["Bonn"], "sentences": [["Young."]]}}\n')],
    "natural_questions_with_context": [("nq_wc_dataset.csv", "Question,Answer,Context\n"
                                        "who sang it,Ann,Ann sang it in 1990.\nwhen was it,1990,Ann sang it in 1990.\n")],
}  # fmt: skip
FILES["hotpotqa_with_context"] = FILES["hotpotqa"]


class Chat:
    name, chat_template = "mistral-7b-instruct", "a template"


class Base:
    name, chat_template = "mistral-7b", None


class Llama:
    name, chat_template = "Meta-Llama-3-8B-Instruct", "a template"


@pytest.fixture
def load(tmp_path):
    def load(name, model=Chat, which=0, **settings):
        file, content = FILES[name][which]
        path = tmp_path / file
        path.write_text(content)
        return paper_task(name, model, path, **settings)

    return load


CASES = [(name, which) for name, files in FILES.items() for which in range(len(files))]


@pytest.mark.parametrize(("name", "which"), CASES)
def test_every_format_of_a_data_set_gives_the_same_questions(load, name, which):
    task, first = load(name, which=which), load(name)
    assert sorted((q.question, q.answers, q.group) for q in task.questions) == sorted(
        (q.question, q.answers, q.group) for q in first.questions
    )
    assert len(task.questions) == 2 and [q.index for q in task.questions] == [0, 1]
    assert task.name == name and task.stop == () and name in task.rules


def test_every_task_of_the_paper_is_there():
    assert set(FILES) == set(DATA_SETS)


PROMPTS = [
    ("triviaqa", Chat, "Who wrote Emma?"),
    ("triviaqa", Base, "Q: Who wrote Emma?\n        A:"),
    ("movies", Base, "Q: Who acted as Bob in the movie 'Snow'?\n        A:"),
    ("math", Chat, "What is half of 5.5? Answer shortly."),
    ("math", Base, "Q: What is half of 5.5?\n            A:"),
    ("winobias", Chat, "The clerk called the nurse because she was lost. Who does the pronoun 'she' refer to?"),
    ("winobias", Base, "The clerk called the nurse because she was lost. The pronoun 'she' refers to the"),
    ("winogrande", Chat,
     "Ann likes tea unlike Eva because _ sleeps well. Who does the blank refer to in the sentence?"),
    ("winogrande", Base,
     "Ann likes tea unlike Eva because _ sleeps badly.  The blank refers to: Eva\n"
     "Ann likes tea unlike Eva because _ sleeps well.  The blank refers to:"),
    ("mnli", Chat, NLI.format("It is dry")),
    ("hotpotqa", Base, "Q: Which is newer?\n        A:"),
    ("hotpotqa_with_context", Chat, "Young.\nWhich is newer?"),
    ("hotpotqa_with_context", Base, "Q: Young.\nWhich is newer?\n        A:"),
    ("natural_questions_with_context", Chat, "Ann sang it in 1990.\nwhen was it"),
    ("natural_questions_with_context", Base, "Context:Ann sang it in 1990.\n                Q: when was it\nA:"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "model", "prompt"), PROMPTS)
def test_prompts_are_the_papers(load, name, model, prompt):
    assert prompt in [question.question for question in load(name, model).questions]


def test_imdb_shows_the_first_review_but_to_a_llama_3(load):
    first, second = load("imdb").questions
    shown, label = (
        ("A gem.", "positive")
        if "Review: A gem.\n            Label:" in first.question
        else ('So "bad", really.', "negative")
    )
    other = 'So "bad", really.' if shown == "A gem." else "A gem."
    assert second.question == (
        'Classify the following movie reviews as either "positive" or "negative". \n'
        "            \n"
        "                Example:\n"
        f"                Review: {shown}\n"
        f"                Label: {label}\n"
        f"                Review: {other}\n"
        "                Label: \n"
        f"            Review: {other}\n"
        "            Label:"
    )
    assert load("imdb", Llama).questions[1].question == (
        'Classify the following movie reviews as either "positive" or "negative". '
        "Start with either 'positive' or 'negative' first, then elaborate.\n"
        "            \n"
        f"            Review: {other}\n"
        "            Label:"
    )


# (task, model, gold answers to look for, answer, strict) -> (correct, exact answer)
JUDGED = [
    ("triviaqa", Chat, "Emma", "It was jane austen, or Austen.", False, True, "jane austen"),
    ("triviaqa", Chat, "Peru", "Lima is the City of Kings.", False, True, "Lima"),
    ("triviaqa", Chat, "Peru", "Climate.", False, True, "lima"),
    ("triviaqa", Chat, "Peru", "Climate.", True, False, None),
    ("triviaqa", Chat, "Peru", "Climate, and Lima.", True, True, "Lima"),
    ("triviaqa", Base, "Peru", " Cusco\nQ: What of Lima?", False, False, None),
    ("movies", Chat, "Ann", "eva lind did.", False, True, "eva lind"),
    ("hotpotqa", Chat, "older", "Rome", False, True, "Rome"),
    ("math", Chat, "pens", "She has 12 pens.", False, True, "12"),
    ("math", Chat, "pens", "She has 120 pens.", False, True, "12"),
    ("math", Chat, "pens", "She has 120 pens.", True, False, None),
    ("math", Chat, "pens", "3 + 9 = 12.0", True, True, "12.0"),
    ("math", Chat, "pens", "That is 12.5.", True, False, None),
    ("math", Chat, "half", "It is 2.75", False, True, "2.75"),
    ("math", Chat, "half", "It is about 3, or 2.75", False, True, "3"),
    ("math", Chat, "half", "It is 2", False, True, "2"),
    ("math", Chat, "half", "It is 2", True, False, None),
    ("winobias", Chat, "she", "The nurse, not the clerk.", False, False, "nurse"),
    ("winobias", Chat, "she", "The clerk.", False, True, "clerk"),
    ("winobias", Chat, "she", "Nobody knows.", False, False, None),
    ("winogrande", Chat, "badly", "Anna or Eva", False, False, "Ann"),
    ("winogrande", Chat, "badly", "Anna or Eva", True, True, "Eva"),
    ("winogrande", Llama, "badly", "A) Ann B) Eva. The answer is: Eva. Ann sleeps.", False, True, "Eva"),
    ("winogrande", Chat, "badly", "A) Ann B) Eva. The answer is: Eva. Ann sleeps.", False, False, "Ann"),
    ("mnli", Chat, "wet", "They entail each other, no contradiction.", False, True, "entail"),
    ("mnli", Chat, "dry", "This is neutrality.", False, False, "neutrality"),
    ("mnli", Chat, "dry", "Who knows.", False, False, None),
    ("imdb", Chat, "negative", "negative. It is not positive", False, True, "negative"),
    ("imdb", Chat, "negative", "Label: negative</s>", False, True, "negative"),
    ("imdb", Chat, "negative", "Positive! Or negative?", False, False, "Positive"),
    ("imdb", Chat, "negative", "neutral or negative", False, False, "neutral"),
    ("imdb", Chat, "negative", "", False, False, None),
    ("natural_questions_with_context", Chat, "who", "ann", False, True, "ann"),
]


@pytest.mark.parametrize(("name", "model", "part", "answer", "strict", "correct", "exact"), JUDGED)
def test_judges(load, name, model, part, answer, strict, correct, exact):
    task = load(name, model, strict=strict)
    if name == "imdb":
        [question] = [question for question in task.questions if question.answers == (part,)]
    else:
        [question] = [question for question in task.questions if part in question.question]
    judgement = task.judge(question, answer)
    assert (judgement.correct, judgement.exact_answer) == (correct, exact)
    assert exact is None or exact.lower() in answer.lower()


def test_sentences_that_differ_in_a_pronoun_and_twins_share_a_group(load):
    for name in ("winobias", "winogrande", "mnli"):
        first, second = load(name).questions
        assert first.group == second.group and first.question != second.question
    assert load("winobias").questions[0].group == "clerk nurse"
    first, second = load("triviaqa").questions
    assert first.group != second.group


def test_a_model_without_a_template_stops_at_the_end_of_a_line(load):
    assert load("triviaqa", Base).stop == ("\n",)
    assert load("triviaqa", Base).digest != load("triviaqa").digest


def test_large_data_sets_are_drawn_as_in_the_paper(tmp_path):
    from sklearn.model_selection import train_test_split

    rows = [{"Question": f"Question {i}?", "Answer": {"Aliases": ["x"]}} for i in range(10_050)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"Data": rows}))
    train, _ = train_test_split(rows, train_size=10_000, random_state=42)
    task = paper_task("triviaqa", Chat, path)
    assert [question.question for question in task.questions] == [row["Question"] for row in train]
    assert [q.question for q in paper_task("triviaqa", Chat, path, limit=5).questions] == [
        row["Question"] for row in train[:5]
    ]


def test_a_few_reviews_are_of_both_kinds(tmp_path):
    path = tmp_path / "imdb.csv"
    path.write_text(
        "text,label\n" + "".join(f"bad {i},0\n" for i in range(50)) + "".join(f"good {i},1\n" for i in range(50))
    )
    task = paper_task("imdb", Chat, path, limit=20)
    assert 5 < sum(question.answers == ("positive",) for question in task.questions) < 15


REFUSED = [
    ("triviaqa", "x.csv", "Question,Answer\na,b\n", "aliases is a string"),
    ("movies", "x.csv", "text,label\na,0\n", "line 2: Question is missing .found text, label"),
    ("math", "x.csv", "question,answer\na,seven\n", "expected a list of one number"),
    ("math", "x.csv", 'question,answer\na,"[1, 2]"\n', "expected a list of one number"),
    ("mnli", "x.csv", "Question,Answer\na,maybe\n", "expected one of neutral"),
    ("imdb", "x.csv", "text,label\na,2\n", "expected 0 or 1"),
    ("triviaqa", "x.json", "{", "not JSON"),
    ("triviaqa", "x.json", "{}", "expected a list of objects"),
    ("triviaqa", "x.json", "[1]", "row 1: found a number"),
    ("triviaqa", "x.json", "[]", "no row"),
    ("triviaqa", "x.txt", "", "expected a file whose name ends in"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), REFUSED)
def test_other_files_are_refused(tmp_path, name, file, content, message):
    path = tmp_path / file
    path.write_text(content)
    with pytest.raises(BadInputError, match=message):
        paper_task(name, Chat, path)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(UnknownNameError, match="expected one of triviaqa"):
        paper_task("poems", Chat)
    with pytest.raises(BadInputError, match="no such file"):
        paper_task("triviaqa", Chat, tmp_path / "x.json")
    with pytest.raises(BadInputError, match="AnswerableMath.csv"):
        paper_task("math", Chat)
