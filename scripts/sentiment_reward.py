"""A reward for task=reviews: what the model writes should praise the films that were praised. The README's example."""

WORDS = {
    "positive": {"good", "great", "fun", "funny", "beautiful", "best", "wonderful"},
    "negative": {"bad", "terrible", "boring", "awful", "poor", "worst", "stupid"},
}
OTHER = {"positive": "negative", "negative": "positive"}


def score(rows, texts):
    said = [{word.strip(".,;!?").lower() for word in text.split()} for text in texts]
    right = [bool(words & WORDS[row["label"]]) for row, words in zip(rows, said)]
    wrong = [bool(words & WORDS[OTHER[row["label"]]]) for row, words in zip(rows, said)]
    return [a - b for a, b in zip(right, wrong)]
