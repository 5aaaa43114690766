"""Prompts as segments: fixed text of a template and the content of its slots, each tokenised by itself."""

from agentmesh.prompt.pieces import texts_of
from agentmesh.prompt.render import ChatTokenizer, Exchange, PromptRenderer, neutral_header
from agentmesh.prompt.segments import FIXED, Content, ContentKind, Message, Prompt, Reader, Segment, said
from agentmesh.prompt.templates import RoleTemplate, Scope

__all__ = [
    "FIXED",
    "ChatTokenizer",
    "Content",
    "ContentKind",
    "Exchange",
    "Message",
    "Prompt",
    "PromptRenderer",
    "Reader",
    "RoleTemplate",
    "Scope",
    "Segment",
    "neutral_header",
    "said",
    "texts_of",
]
