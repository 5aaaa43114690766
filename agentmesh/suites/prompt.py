"""A task's prompt: a template of a mesh's main input over a sample's fields."""

from __future__ import annotations

from typing import final

import jinja2
import jinja2.meta

from agentmesh.errors import TemplateError, did_you_mean, listing
from agentmesh.prompt.templates import environment
from agentmesh.suites.samples import LETTERS, Sample
from agentmesh.suites.task import Task


@final
class SamplePrompt:
    """Renders samples; the fields are the template's names, and ``letters`` names the choices.

    Args:
        task: its file's ``prompt`` is the template.

    Raises:
        TemplateError: bad syntax, or a name that is no field of a sample.
    """

    def __init__(self, task: Task) -> None:
        self._place = f"{task.folder / 'task.yaml'}: prompt"
        try:
            used = jinja2.meta.find_undeclared_variables(environment().parse(task.spec.prompt))
            self._template = environment().from_string(task.spec.prompt)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{self._place}, line {error.lineno} of the template: {error.message}") from error
        known = {*Sample.model_fields, "letters"}
        for name in sorted(used - known):
            hint = did_you_mean(name, known)
            raise TemplateError(f"{self._place}: no field {name!r}; a sample has {listing(known)}.{hint}")

    def render(self, sample: Sample) -> str:
        """The main input's text, outer line breaks removed.

        Raises:
            TemplateError: the template fails on this sample.
        """
        try:
            fields = {name: getattr(sample, name) for name in Sample.model_fields}
            return self._template.render(**fields, letters=LETTERS).strip("\n")
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateError(f"{self._place}: {error}") from error
