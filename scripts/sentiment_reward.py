"""A reward for task=reviews: does what the model writes praise the films that were praised?"""

WORDS = {
    "positive": {"good", "great", "fun", "funny", "beautiful", "best", "wonderful"},
    "negative": {"bad", "terrible", "boring", "awful", "poor", "worst", "stupid"},
}


def score(rows, texts):
    """1 for a text with a word of its row's side and none of the other, -1 for the contrary, else 0."""
    values = []
    for row, text in zip(rows, texts):
        said = {word.strip(".,;!?'\"").lower() for word in text.split()}
        sides = {side: bool(said & words) for side, words in WORDS.items()}
        values.append(0 if sides["positive"] == sides["negative"] else 1 if sides[row["label"]] else -1)
    return values
