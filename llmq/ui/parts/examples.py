"""Prompts to begin with: (name on the button, prompt)."""

_LONG = (
    "Here are notes from a workshop on running language models on small computers. The first speaker explained that "
    "reading the weights from memory takes more time than multiplying them, because one token needs every weight "
    "once. The second speaker showed that halving the bytes of each weight can therefore almost double the speed, if "
    "nothing else gets in the way. The third speaker warned that a few activations are hundreds of times larger than "
    "the rest, and that rounding everything to eight bits without care turns them into noise. The fourth speaker "
    "measured perplexity before and after, and found a difference of about one percent when the large activations "
    "were kept in sixteen bits. In the discussion somebody asked why a library with half the memory was slower all "
    "the same, and the answer was that each layer started many small operations and waited for each of them. "
    "Summarise these notes in three sentences for a reader who has never heard of quantization."
)

EXAMPLES: list[tuple[str, str]] = [
    ("Paris", "Plan a 3-day itinerary in Paris."),
    ("Code", "Write a Python function that returns the n-th Fibonacci number, with a docstring."),
    ("Arithmetic", "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Explain step by step."),
    ("Story", "Tell a short story about a lighthouse keeper who finds a message in a bottle."),
    ("Français", "Explique en français, en trois phrases, pourquoi le ciel est bleu."),
    ("Long prompt", _LONG),
]
