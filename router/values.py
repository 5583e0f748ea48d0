"""Names for what JSON can hold, so that nothing from outside is typed Any."""

from __future__ import annotations

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
JsonObject = dict[str, Json]
