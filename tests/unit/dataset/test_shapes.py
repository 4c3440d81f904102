"""Records of every shape become conversations; every record that cannot is refused with its reason."""

import json

import pytest

from philora.dataset.records import Fault
from philora.dataset.shapes import Shape, detect, prompt_of, shape_from_config
from philora.errors import DataError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}

SHAPES = {
    "messages": ("messages", {"messages": [S, Q, A]}, [S, Q, A]),
    "messages as JSON text": ("messages", {"messages": json.dumps([Q, A])}, [Q, A]),
    "messages first": ("messages", {"prompt": "x", "prompt_id": "1", "messages": [Q, A]}, [Q, A]),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [S, Q, A],
    ),
    "sharegpt with roles": ("sharegpt", {"conversations": [Q, A]}, [Q, A]),
    "sharegpt, system beside": (
        "sharegpt",
        {"system": "s", "conversation": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        [S, Q, A],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "do", "input": "this", "output": "a"},
        [{"role": "user", "content": "do\nthis"}, A],
    ),
    "alpaca without input": ("alpaca", {"instruction": "q", "input": "", "output": "a", "prompt": "x"}, [Q, A]),
    "alpaca with system and history": (
        "alpaca",
        {"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]},
        [S, Q, A, Q, A],
    ),
    "prompt and completion": ("prompt_completion", {"prompt": "q", "completion": "a"}, [Q, A]),
    "prompt and completion as lists": ("prompt_completion", {"prompt": [S, Q], "completion": [A]}, [S, Q, A]),
    "prompt list, completion text": ("prompt_completion", {"prompt": [S, Q], "completion": "a"}, [S, Q, A]),
    "question and answer": ("prompt_completion", {"id": 3, "question": "q", "answer": "a"}, [Q, A]),
    "query and response": ("prompt_completion", {"query": "q", "response": "a"}, [Q, A]),
    "text": ("text", {"text": "Once."}, [{"role": "text", "content": "Once."}]),
}


@pytest.mark.parametrize("case", list(SHAPES))
def test_shapes_are_detected_and_normalised(case):
    name, record, messages = SHAPES[case]
    shape = detect([record], "f")
    assert shape.name == name
    assert shape.read(record).messages == messages
    assert shape.read(json.dumps(record).encode()).messages == messages
    assert shape_from_config(name, None, "f") == shape


@pytest.mark.parametrize(
    ("alias", "role"),
    [
        ("human", "user"),
        ("Human", "user"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("function_call", "assistant"),
        ("observation", "tool"),
        ("function_response", "tool"),
        ("ipython", "tool"),
        ("developer", "system"),
        (" USER ", "user"),
    ],
)
def test_aliases_of_roles(alias, role):
    record = {
        "conversations": [{"from": alias, "value": "x"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    }
    assert Shape("sharegpt").read(record).messages[0]["role"] == role


def test_tools_and_tool_calls_pass_through():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f", "score": 0.5, "extra": None}
    conversation = Shape("messages").read({"messages": [Q, call, result, A], "tools": '[{"name": "f"}]'})
    assert conversation.tools == [{"name": "f"}]
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert conversation.messages[2] == {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f"}
    assert not conversation.is_plain


def test_parts_of_text_are_joined_and_empty_system_turns_left_out():
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}
    empty = {"role": "system", "content": "  "}
    assert Shape("messages").read({"messages": [empty, parts, A]}).messages == [{"role": "user", "content": "q!"}, A]


def test_two_user_turns_are_accepted_and_marked():
    assert Shape("messages").read({"messages": [Q, Q, A]}).two_user_turns
    assert not Shape("messages").read({"messages": [Q, A, Q, A]}).two_user_turns


def test_weight_zero_takes_a_turn_out_of_the_loss():
    quiet = {**A, "weight": 0}
    assert Shape("messages").read({"messages": [S, Q, quiet, Q, {**A, "weight": 1}]}).untrained == {2}


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"weight": "1"}, True),
        ({"weight": "0"}, False),
        ({"weight": False}, False),
        ({"weight": None}, True),
        ({"loss": True}, True),
        ({"loss": False}, False),
        ({"loss": "False"}, False),
        ({"train": 0}, False),
        ({"training": "true"}, True),
        ({"trainable": False}, False),
        ({"mask": True}, False),
        ({"masked": 0}, True),
        ({"weight": 1, "loss": False}, False),
    ],
)
def test_flags_of_a_turn_mean_what_they_say(flags, trained):
    read = Shape("messages").read({"messages": [Q, A, Q, {**A, **flags}]})
    assert read.untrained == (set() if trained else {3})
    assert read.unread == ()


@pytest.mark.parametrize("key", ["weight", "loss", "train", "mask"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "half", "", [1], float("nan")])
def test_flags_that_say_neither_are_refused(key, value):
    with pytest.raises(Fault) as caught:
        Shape("messages").read({"messages": [Q, {**A, key: value}]})
    assert caught.value.name == f"messages[1].{key}"


def test_flags_of_other_turns():
    quiet = {**Q, "loss": False, "weight": 0}
    assert Shape("messages").read({"messages": [quiet, A]}).untrained == set()
    with pytest.raises(Fault) as caught:
        Shape("messages").read({"messages": [{**Q, "loss": True}, A]})
    assert "loss on turns of the assistant only" in caught.value.at("f:1")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("messages", {"messages": [Q, A]}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("text", {"text": "q a"}),
    ],
)
def test_what_changes_the_meaning_is_refused_in_every_shape(name, record):
    more = {"images": ["a.png"], "audio": {"path": "a.wav"}, "function_call": {"name": "f"}, "loss_mask": [0, 1]}
    for key, value in more.items():
        with pytest.raises(Fault) as caught:
            Shape(name).read({**record, key: value})
        assert caught.value.name == key
        assert Shape(name).read({**record, key: None}).unread == ()


@pytest.mark.parametrize(
    "flags",
    [
        {"label": False},
        {"label": "false"},
        {"label": "Bad "},
        {"label": "rejected"},
        {"weight": 0},
        {"loss": False},
        {"mask": True},
    ],
)
def test_records_that_say_not_to_be_trained_are_refused(flags):
    for record in ({"messages": [Q, A]}, {"prompt": "q", "completion": "a"}):
        shape = detect([record], "f")
        assert shape.read(record)
        with pytest.raises(Fault):
            shape.read({**record, **flags})
    # As a text to be trained whole, a record may have a label of a class.
    assert Shape("text").read({"text": "x", "label": 0}).unread == ("label",)


def test_fields_that_are_read_with_a_pair():
    read = Shape("prompt_completion").read
    record = {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "qa", "id": 0, "empty": ""}
    found = read(record)
    assert found.messages[0]["content"] == "Who?\nAnn came."
    assert set(found.unread) == {"category", "id"}
    inside = read({"prompt": "Ann came. Who?", "completion": "Ann.", "context": "Ann came."})
    assert inside.messages[0]["content"] == "Ann came. Who?"  # the context stands in the prompt already
    assert inside.unread == ()
    full = read(
        {"system_prompt": "s", "question": "q", "response": "a", "history": [["q", "a"]], "tools": [{"name": "f"}]}
    )
    assert full.messages == [S, Q, A, Q, A]
    assert full.tools == [{"name": "f"}]


def test_a_prompt_of_turns_has_no_loss_on_any_of_them():
    found = Shape("prompt_completion").read({"prompt": [S, Q, A, Q], "completion": [A], "system": "s"})
    assert found.messages == [S, Q, A, Q, A]
    assert found.untrained == {2}
    folded = Shape("prompt_completion").read({"prompt": [Q, A, Q], "completion": "a", "system": "s"})
    assert (folded.messages, folded.untrained) == ([S, Q, A, Q, A], {2})


def test_two_system_texts():
    for name in ("messages", "conversations"):
        shape = detect([{name: [Q, A]}], "f")
        assert shape.read({name: [Q, A], "system": "s"}).messages == [S, Q, A]
        assert shape.read({name: [S, Q, A], "system": " s "}).messages == [S, Q, A]
        with pytest.raises(Fault):
            shape.read({name: [S, Q, A], "system": "another"})
        with pytest.raises(Fault):
            shape.read({name: [Q, A], "system": ["s"]})


def test_one_row_a_message_is_no_text():
    for names in (("role", "text"), ("speaker", "message"), ("from", "body", "date")):
        with pytest.raises(DataError, match="a complete conversation in each record"):
            detect([dict.fromkeys(names, "x")], "f")
    assert detect([{"text": "x", "url": "u"}], "f").name == "text"


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"query": "q"}, [Q]),
        ({"user": "q"}, [Q]),
        ({"input": "q"}, [Q]),
        ({"question": "q"}, [Q]),
        ({"prompt": "q"}, [Q]),
        ({"instruction": "q"}, [Q]),
        ({"instruction": "q", "context": "c"}, [{"role": "user", "content": "q\nc"}]),
        ({"instruction": "q", "input": "c"}, [{"role": "user", "content": "q\nc"}]),
        ({"user": "q", "system": "s"}, [S, Q]),
        ({"prompt": [S, Q]}, [S, Q]),
        ({"prompt": [Q, A, Q], "completion": [A], "label": False}, [Q, A, Q]),
        ({"question": "q", "answer": "a", "weight": 0}, [Q]),
        ({"messages": [Q, A, Q]}, [Q, A, Q]),
        ({"messages": [Q, {**A, "weight": 0}], "system": "s"}, [S, Q]),
        ({"conversations": [{"from": "human", "value": "q"}]}, [Q]),
    ],
)
def test_prompts_are_read_by_the_readers_of_training(record, asked):
    assert prompt_of(record, "f:1").messages == asked
    assert prompt_of(json.dumps(record).encode(), "f:1").messages == asked


def test_prompts_that_cannot_be_asked():
    for record in ({"text": "x"}, {"messages": [A]}):
        with pytest.raises(Fault):
            prompt_of(record, "f:1")
    with pytest.raises(DataError):
        prompt_of({"utterance": "x"}, "f:1")


def test_fields_that_are_null_do_not_count():
    assert detect([{"text": None, "prompt": "q", "completion": "a", "messages": None}], "f").name == "prompt_completion"


def test_the_first_readable_record_decides():
    assert detect([b"{broken", b'{"text": "x"}'], "f").name == "text"
    assert detect([b"{broken"], "f").name == "messages"  # reading it reports the fault


# ----------------------------------------------------------------------------------------------- columns


def columns(record, **templates):
    return shape_from_config("auto", templates, "data").read(record)


def test_columns():
    record = {"instruction": "sum", "input": "1 2", "output": "3", "n": 7, "empty": None}
    made = columns(record, user="{instruction}\n Input: {input}", assistant="{output}", system="{{n}}={n}{empty}")
    assert made.messages == [
        {"role": "system", "content": "{n}=7"},
        {"role": "user", "content": "sum\n Input: 1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert columns(record, prompt="{input}", completion="{output}").messages[1]["content"] == "3"
    assert columns(record, text="{instruction}: {output}").messages == [{"role": "text", "content": "sum: 3"}]
    assert columns({"dialog": [Q, A]}, messages="{dialog}").messages == [Q, A]


def test_columns_with_a_list_of_turns_and_a_system_text():
    record = {"dialog": [Q, A], "who": "Ann", "id": 3}
    found = columns(record, messages="{dialog}", system="You are {who}.")
    assert found.messages == [{"role": "system", "content": "You are Ann."}, Q, A]
    assert found.unread == ("id",)


def test_a_template_that_names_no_column_is_refused_with_the_columns():
    record = {"Customer message": "q", "Reply": "a"}
    with pytest.raises(DataError) as caught:
        columns(record, user="Customer message", assistant="{Reply}")
    assert str(caught.value) == (
        "data: columns.user='Customer message' - expected a template with the name of a column in braces (the columns "
        "are Customer message, Reply). Did you mean '{Customer message}'?"
    )
    assert columns(record, user="{Customer message}", assistant="{Reply}", system="Be brief.").messages[0] == {
        "role": "system",
        "content": "Be brief.",
    }


def test_columns_decide_the_shape_even_where_another_would_fit():
    assert columns({"messages": [Q, A], "x": "b"}, user="{x}", assistant="{x}").messages[0]["content"] == "b"


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"asistant": "{a}"}, "data: columns.asistant='{a}' - expected one of system, user, assistant"),
        ({"text": "{a}", "system": "{b}"}, "expected text alone. Remove the other keys"),
        ({"messages": "{a}", "user": "{b}"}, "expected messages alone, or with system"),
        ({"asistant": "{a}"}, "Did you mean 'assistant'?"),
        ({"user": "{a}"}, "expected a template for assistant (or completion, text or messages). Add one."),
        ({"assistant": "{a"}, "columns.assistant='{a' - expected a template such as '{instruction}'"),
    ],
)
def test_columns_that_cannot_be_used(templates, message):
    with pytest.raises(DataError) as caught:
        shape_from_config("auto", templates, "data")
    assert message in str(caught.value)


def test_an_unknown_format():
    with pytest.raises(DataError, match=r"data: format='sharegtp' - expected one of auto, .* Did you mean 'sharegpt'"):
        shape_from_config("sharegtp", None, "data")


@pytest.mark.parametrize(
    "record", [{"question": "2+2?", "answer": 4}, {"instruction": "2+2?", "output": 4.5}, {"text": 4}]
)
def test_a_number_where_a_text_belongs_is_refused_with_what_to_do(record):
    with pytest.raises(Fault) as caught:
        detect([record], "data.json").read(record)
    assert caught.value.expected == "text, not a number"
    name = list(record)[-1]
    assert f'"{{{name}}}"' in str(caught.value.at("x"))


def test_names_of_columns_with_spaces_around_them_are_recognised():
    record = {"question ": "2+2?", " Answer": "4"}
    shape = detect([record], "data.csv")
    assert [message["content"] for message in shape.read(record).messages] == ["2+2?", "4"]


@pytest.mark.parametrize(
    ("record", "program"),
    [
        ({"title": "T", "mapping": {"a": {"message": None}}, "current_node": "a"}, "ChatGPT"),
        ({"type": "message", "user": "U1", "text": "Hi", "ts": "1.0", "thread_ts": "1.0"}, "Slack"),
        ({"id": 1, "subject": "s", "requester_id": 5, "comments": [{"author_id": 5}]}, "Zendesk"),
        ({"id": "31", "source": {"body": "b"}, "conversation_parts": {"conversation_parts": []}}, "Intercom"),
    ],
)
def test_the_export_of_a_program_has_a_recipe(record, program):
    with pytest.raises(DataError, match=rf"an export of {program}: docs/cookbook.md"):
        detect([record], "data.json")


@pytest.mark.parametrize(
    ("record", "user", "assistant"),
    [
        ({"Nr": "1", "Anfrage": "Wo ist es?", "Antwort": "Es kommt.", "Tag": "3.3."}, "Anfrage", "Antwort"),
        ({"n": 1, "{odd}": "Where is my parcel?", "reply": "y"}, "question", "answer"),
        ({"a": {"b": "c"}}, "question", "answer"),
    ],
)
def test_the_two_longest_texts_are_proposed(record, user, assistant):
    with pytest.raises(DataError) as caught:
        detect([record], "data.json")
    assert f'{{user: "{{{user}}}", assistant: "{{{assistant}}}"}}' in str(caught.value)


def test_fields_of_no_known_shape():
    with pytest.raises(DataError) as caught:
        detect([{"utterance": "x", "reply": "y"}], "data.jsonl")
    assert str(caught.value) == (
        "data.jsonl: fields='utterance, reply' - expected messages, conversations, instruction and output, prompt and "
        'completion, or text. For other names set columns, such as {user: "{utterance}", assistant: "{reply}"}; on the '
        'command line: \'data.train.columns={user: "{utterance}", assistant: "{reply}"}\'.'
    )


# ---------------------------------------------------------------------------------------------- refusals

REFUSALS = {
    "no assistant turn": (
        "messages",
        {"messages": [Q]},
        "roles='user' - expected at least one turn of the assistant. Add an answer or remove the record.",
    ),
    "unknown role": (
        "messages",
        {"messages": [{"role": "asistant", "content": "x"}]},
        "messages[0].role='asistant' - expected one of system, user, assistant, tool or one of their aliases. "
        "Did you mean 'assistant'?",
    ),
    "role of a wrong type": (
        "messages",
        {"messages": [{"role": 5, "content": "x"}]},
        "messages[0].role=5 - expected one of",
    ),
    "empty answer": (
        "messages",
        {"messages": [Q, {"role": "assistant", "content": " \n"}]},
        "messages[1].content=' \\n' - expected an answer that is not empty. Write the answer or remove the record.",
    ),
    "empty answer, sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
        "conversations[1].value='' - expected an answer that is not empty",
    ),
    "missing content": (
        "messages",
        {"messages": [{"role": "user"}, A]},
        "messages[0].content=None - expected the text of the turn. Add it or remove the record.",
    ),
    "content of a wrong type": (
        "messages",
        {"messages": [{"role": "user", "content": 3}, A]},
        "messages[0].content=3 - expected text, not a number.",
    ),
    "a picture": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, A]},
        "expected text, or a list of parts of type text. Pictures and sound are not trained on.",
    ),
    "no role": (
        "messages",
        {"messages": [{"content": "x"}]},
        "messages[0]='content' - expected role and content, or from and value",
    ),
    "a turn that is no object": (
        "messages",
        {"messages": ["q", "a"]},
        "messages[0]='q' - expected an object with role and content.",
    ),
    "no list": ("messages", {"messages": {"role": "user"}}, "expected a list of messages, not an object."),
    "no turns": (
        "messages",
        {"messages": []},
        "messages=[] - expected at least one turn of the user and one of the assistant.",
    ),
    "text that is no list": ("messages", {"messages": "hello"}, "messages='hello' - expected a list of messages ("),
    "another shape": (
        "messages",
        {"message": [Q, A]},
        "record='message' - expected a field 'messages'. Did you mean 'message'?",
    ),
    "bad weight": (
        "messages",
        {"messages": [Q, {**A, "weight": 2}]},
        "messages[1].weight=2 - expected 0 (no loss on this turn) or 1.",
    ),
    "only weight zero": (
        "messages",
        {"messages": [Q, {**A, "weight": 0}]},
        "weight=0 - expected at least one turn of the assistant with weight 1.",
    ),
    "tools": ("messages", {"messages": [Q, A], "tools": "x"}, "tools='x' - expected a list of tool descriptions ("),
    "tools of a wrong type": (
        "messages",
        {"messages": [Q, A], "tools": [1]},
        "tools=[1] - expected a list of tool descriptions, but a number is in it.",
    ),
    "alpaca without output": ("alpaca", {"instruction": "q"}, "record='instruction' - expected a field 'output'."),
    "alpaca, empty output": (
        "alpaca",
        {"instruction": "q", "output": ""},
        "output='' - expected an answer that is not empty.",
    ),
    "alpaca, number": ("alpaca", {"instruction": "q", "output": 4}, "output=4 - expected text, not a number."),
    "history": (
        "alpaca",
        {"instruction": "q", "output": "a", "history": ["x"]},
        "history='x' - expected pairs of question and answer.",
    ),
    "prompt without completion": (
        "prompt_completion",
        {"prompt": "q"},
        "record='prompt' - expected a field 'completion'.",
    ),
    "empty completion": (
        "prompt_completion",
        {"prompt": "q", "completion": ""},
        "completion='' - expected an answer that is not empty.",
    ),
    "empty text": ("text", {"text": " "}, "text=' ' - expected text that is not empty. Remove the record."),
    "no text": ("text", {"text": None}, "expected a field 'text'."),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_records_that_are_refused(case):
    name, record, message = REFUSALS[case]
    with pytest.raises(Fault) as caught:
        Shape(name).read(record)
    text = caught.value.at("f:3")
    assert text.startswith("f:3: ")
    assert message.rstrip(".") in text


def test_columns_that_a_record_lacks():
    with pytest.raises(Fault) as caught:
        columns({"question": "q", "answer": "a"}, user="{questoin}", assistant="{answer}")
    assert caught.value.at("f:1") == (
        "f:1: columns='{questoin}' - expected names of this record's columns (question, answer), not 'questoin'. "
        "Did you mean 'question'?"
    )
    with pytest.raises(Fault) as caught:
        columns({"question": ["q"], "answer": "a"}, user="{question}", assistant="{answer}")
    assert "question=['q'] - expected text or a number for a template, not a list." in caught.value.at("f:1")


def test_names_of_a_pair_may_begin_with_a_capital_letter_as_spreadsheets_write_them():
    record = {"Question": "2+2?", "Answer": "4", "Agent": "Jo"}
    shape = detect([record], "sheet.csv")
    assert shape.why == "by the fields Question and Answer"
    assert [message["content"] for message in shape.read(record).messages] == ["2+2?", "4"]
