"""What a request may ask for."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a server; a request beyond one is refused with status 400, which names it.

    Attributes:
        n: samples of a request.
        logprobs: best tokens that are reported with each token.
        stops: stop strings; ``stop_length``: characters of one.
        biases: tokens with a bias.
        grammar_bytes: of a schema, regular expression or grammar.
        grammar_seconds: that preparing a grammar may take.
        request_seconds: after which a request ends with what it has.
        body_bytes: of an HTTP request.
    """

    n: int = 16
    logprobs: int = 20
    stops: int = 16
    stop_length: int = 512
    biases: int = 512
    grammar_bytes: int = 65_536
    grammar_seconds: float = 10.0
    request_seconds: float = 3600.0
    body_bytes: int = 8_388_608

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"Limits: {field.name} must be a number above 0, got {value!r}.")
