"""The one exception users see: it says what was found, what was expected and what to do."""


class StructLoRAError(RuntimeError):
    """Raised wherever StructLoRA cannot act as asked.

    Args:
        found (`str`): what the code met.
        expected (`str`): what it needs instead.
        remedy (`str`): what the user can do about it.

    Example:
        >>> try:
        ...     StructLoRAConfig(filter="ibb")
        ... except StructLoRAError as error:
        ...     print(error.remedy)
        correct `filter`
    """

    def __init__(self, found: str, expected: str, remedy: str):
        self.found, self.expected, self.remedy = found, expected, remedy
        super().__init__(f"StructLoRA found {found}. Expected {expected}. Fix: {remedy}.")

    def __reduce__(self):
        return type(self), (self.found, self.expected, self.remedy)
