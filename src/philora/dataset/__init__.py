"""Prepare data: records of any accepted shape -> conversations -> tokens and labels, cached on disk.

`prepare` does all of it for a run. The parts, in the order that data flows through them: `read` (files and hub),
`shapes` (records to conversations), `template` (conversations to tokens and labels), `store` (cache), `prepare`.
`lengths` warns of rows that are too long for a model.
"""

from philora.configuration.sections import DATA_FORMATS as FORMATS
from philora.dataset.conversations import Conversations
from philora.dataset.data_report import DataReport, SourceReport, SplitReport
from philora.dataset.lengths import length_notices, row_lengths
from philora.dataset.messages import Conversation, Message
from philora.dataset.prepare import PreparedData, places_of, prepare
from philora.dataset.read import resolve
from philora.dataset.records import Source
from philora.dataset.shapes import Shape
from philora.dataset.template import (
    IGNORED,
    Encoded,
    Encoder,
    encode_conversation,
    preview,
    prompts_and_references,
)
from philora.dataset.turn_proof import TemplateFault

__all__ = [
    "FORMATS",
    "IGNORED",
    "Conversation",
    "Conversations",
    "DataReport",
    "Encoded",
    "Encoder",
    "Message",
    "PreparedData",
    "Shape",
    "Source",
    "SourceReport",
    "SplitReport",
    "TemplateFault",
    "encode_conversation",
    "length_notices",
    "places_of",
    "prepare",
    "preview",
    "prompts_and_references",
    "resolve",
    "row_lengths",
]
