"""A task's text as files: JSON lines as `moepager profile` reads them, one item a line, in a form with files.

Files have names of their senders' choosing; nobody here looks at them.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from service.refusals import explain
from service.schemas import MOST_ITEMS, ItemBody, TaskBody
from store.errors import InvalidInput

WORDS = ("name", "description")
ITEMS = "JSON lines, an item a line, as `moepager profile` reads them."
FILES = {"exemplars": "A text a line.", "calibration": ITEMS, "evaluation": ITEMS}
MOST_FIELDS = 16
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {
                        **{name: {"type": "string"} for name in WORDS},
                        **{
                            name: {"type": "string", "format": "binary", "description": about}
                            for name, about in FILES.items()
                        },
                    },
                }
            }
        },
    }
}


async def task_of(form: FormData) -> TaskBody:
    """The body that the same texts would have made as JSON. Raises InvalidInput with the file's part and line."""
    fields: dict[str, Any] = {name: value for name, value in form.items() if name not in FILES}
    files = {name: _file(form, name) for name in FILES}
    fields["exemplars"] = [line for line in await _lines(files["exemplars"], "exemplars") if line]
    for part in ("calibration", "evaluation"):
        fields[part] = await _items(files[part], part)
    try:
        return TaskBody.model_validate(fields)
    except ValidationError as error:
        message, param = explain([{**each, "loc": ("body", *each["loc"])} for each in error.errors()])
        raise InvalidInput(message, param=param) from None


def _file(form: FormData, part: str) -> UploadFile | None:
    given = form.getlist(part)
    files = [one for one in given if isinstance(one, UploadFile)]
    if len(given) > 1 or len(files) < len(given):
        raise InvalidInput(f"{part} must be one file, as `curl -F {part}=@FILE` sends it.", param=part)
    return files[0] if files else None


async def _items(file: UploadFile | None, part: str) -> list[ItemBody]:
    found: list[ItemBody] = []
    for number, line in enumerate(await _lines(file, part), 1):
        if not line:
            continue
        if len(found) == MOST_ITEMS:
            raise InvalidInput(f"{part}: more than {MOST_ITEMS} items. Send a sample of them.", param=part)
        try:
            found.append(ItemBody.model_validate_json(line))
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"]))
            said = wrong["msg"].removeprefix("Value error, ")
            raise InvalidInput(
                f"{part}, line {number}: {f'{where}: ' if where else ''}{said}. A line is one item: "
                '{"prompt": ...}, {"prompt": ..., "response": ...} or {"messages": [...]}.',
                param=part,
            ) from None
    return found


async def _lines(file: UploadFile | None, part: str) -> list[str]:
    if file is None:
        return []
    try:
        text = (await file.read()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{part}: not UTF-8 at byte {error.start}. Save the file as UTF-8.", param=part) from None
    return [line.strip() for line in text.split("\n")]
