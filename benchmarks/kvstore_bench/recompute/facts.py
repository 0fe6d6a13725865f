"""Pairs of made-up facts for two documents, each with a question whose answer needs both facts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FactPair:
    """Two facts and a question that needs both."""

    first: str
    second: str
    question: str
    answer: str


PAIRS = (
    FactPair(
        "Marta Lindqvist keeps the archive of the harbour office.",
        "Every archive that Marta Lindqvist keeps is opened with the code 7419.",
        "Which code opens the archive of the harbour office?",
        "7419",
    ),
    FactPair(
        "The lighthouse of Brennholm is painted by the workshop in Tarnow Street.",
        "The workshop in Tarnow Street uses green paint for everything that it is given.",
        "In which colour is the lighthouse of Brennholm painted?",
        "green",
    ),
    FactPair(
        "The ferry Adelheid leaves from the pier that is called Old Anchor.",
        "From Old Anchor all boats leave on Thursday, and on no other day.",
        "On which day does the ferry Adelheid leave?",
        "Thursday",
    ),
    FactPair(
        "Doctor Ocampo wrote her thesis about a comet that was named Vesper Nine.",
        "Vesper Nine was seen for the first time by an observer in Lisbon.",
        "In which city was the comet seen first that Doctor Ocampo wrote her thesis about?",
        "Lisbon",
    ),
    FactPair(
        "The violin of the Radek family was sold to the museum in Ostrava Hill.",
        "In the museum in Ostrava Hill all instruments hang in room 38.",
        "In which room does the violin of the Radek family hang?",
        "38",
    ),
    FactPair(
        "Project Heron is led by the woman who also runs the seed bank, Ines Falk.",
        "Ines Falk can be reached by telephone only under the number 5520.",
        "Under which number can the leader of Project Heron be reached?",
        "5520",
    ),
    FactPair(
        "The bakery at the corner gets its flour from a mill named Three Willows.",
        "Three Willows grinds nothing but barley since its owner has changed.",
        "From which grain is the flour of the bakery at the corner?",
        "barley",
    ),
    FactPair(
        "The winner of the chess tournament, Tomas Brandvold, plays for the club Silver Pawn.",
        "The club Silver Pawn meets in the cellar of the railway station.",
        "Where does the club of the winner of the chess tournament meet?",
        "the cellar of the railway station",
    ),
    FactPair(
        "The old map of the island was drawn with ink that came from the shop of Lu Wen.",
        "The shop of Lu Wen sold ink for eleven years, and all of it was made of walnuts.",
        "What was the ink made of that the old map of the island was drawn with?",
        "walnuts",
    ),
    FactPair(
        "The greenhouse on the north side is heated by the engine that they call Bertha.",
        "The engine that they call Bertha burns wood pellets and stops when there are none.",
        "What is burnt to heat the greenhouse on the north side?",
        "wood pellets",
    ),
)
