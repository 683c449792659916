"""Answers: from the best sentences or from a tiny decoder, cited; silence below the threshold."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.app.answers.answering import Answer, Answering, Piece
from caravan.app.answers.evidence import STORED, Weigher, calibrated
from caravan.app.answers.generators import Extractive, HuggingFace
from caravan.config import AdapterConfig, BackboneConfig
from caravan.data.records import Document
from caravan.errors import AnswerError, BackboneError, DataError
from caravan.model.backbone import load_backbone
from caravan.storage import load
from caravan.training.calibration import Calibration
from command_line import check_refused, run
from saved_retrievers import make_retriever
from tiny_models import make_tiny_bert, make_tiny_gpt2, make_tiny_llama

MODELS = Path(os.environ.get("CARAVAN_MODELS", Path(__file__).parents[3] / "shared" / "models"))
ALWAYS = Calibration(threshold=0.0)
DOCUMENTS = (
    Document("parcel", "The carrier sends a link. It shows where the parcel is.", "Track a parcel"),
    Document("login", "Ask for a new password. The mail comes at once.", "Reset the password"),
    Document("money", "Send it back. The refund takes a week.", "Refunds"),
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path_factory.mktemp("bert")))))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = make_tiny_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)
    return load_backbone(BackboneConfig(name=str(folder)))


@pytest.fixture
def retriever(encoder):
    return make_retriever(encoder, DOCUMENTS)


class Scripted:
    """A generator that says what it is told to."""

    name = "scripted"

    def __init__(self, *pieces):
        self.pieces = [Piece(piece) if isinstance(piece, str) else piece for piece in pieces]

    def write(self, question, sources):
        yield from self.pieces


def test_an_extractive_answer_is_made_of_sentences_of_the_documents_it_cites(retriever):
    answer = Answering(retriever, calibration=ALWAYS).answer("where is my parcel")
    assert answer.known
    assert [citation.number for citation in answer.citations] == list(range(1, len(answer.citations) + 1))
    texts = {document.doc_id: document.text for document in DOCUMENTS}
    for line, citation in zip(answer.text.splitlines(), answer.citations, strict=True):
        assert line.endswith(f" [{citation.number}]")
        assert line.removesuffix(f" [{citation.number}]") in texts[citation.doc_id]
    assert answer.confidence == pytest.approx(sum(citation.probability for citation in answer.citations), abs=1e-4)


def test_the_sentence_most_like_the_question_is_chosen(retriever):
    answer = Answering(retriever, calibration=replace(ALWAYS, similarity=1000.0)).answer("The refund takes a week.")
    assert [citation.doc_id for citation in answer.citations] == ["money"]
    assert "The refund takes a week." in answer.text


def test_below_the_threshold_nothing_is_known_and_the_closest_documents_are_named(retriever):
    answer = Answering(retriever, Scripted("never"), calibration=Calibration(threshold=1.1)).answer("where")
    assert (answer.text, answer.citations, answer.known) == ("I don't know.", (), False)
    assert answer.found


def test_what_streams_adds_up_to_the_answer_and_a_fresh_start_voids_what_was_said(retriever):
    answering = Answering(
        retriever, Scripted("Sent ", "[1", "]", Piece("", afresh=True), "Lost [1][9]"), calibration=ALWAYS
    )
    *pieces, last = answering.stream("where is it")
    assert [piece.text for piece in pieces] == ["Sent ", "[1", "]", "", "Lost [1][9]"]
    assert isinstance(last, Answer)
    assert last.text == "Lost [1]"
    assert [citation.number for citation in last.citations] == [1]


@pytest.mark.parametrize("said", ["I don't know.", "I don\N{RIGHT SINGLE QUOTATION MARK}t know that [1]", "", " \n"])
def test_a_generator_that_does_not_know_is_believed(retriever, said):
    answer = Answering(retriever, Scripted(said), calibration=ALWAYS).answer("where is it")
    assert (answer.known, answer.citations) == (False, ())


@pytest.mark.parametrize("question", ["", "  ", "\udcff"])
def test_a_question_that_is_no_text_is_refused(retriever, question):
    with pytest.raises(DataError):
        Answering(retriever).answer(question)


def test_sentences_are_encoded_once_for_all_questions(retriever, monkeypatch):
    weigher = Weigher(retriever)
    first = weigher.weigh("where is it")
    seen = []
    encode = retriever.encoder.encode
    monkeypatch.setattr(retriever.encoder, "encode", lambda texts, **options: seen.append(len(texts)) or encode(texts))
    assert weigher.weigh("where is it") == first
    assert seen == [1]


def test_the_model_that_encodes_writes_with_the_same_weights_and_without_the_adapter(decoder):
    from transformers import AutoModelForCausalLM

    retriever = make_retriever(decoder, DOCUMENTS, adapter=AdapterConfig(kind="full"))
    generator = HuggingFace.named("self", decoder, answer_tokens=8)
    shared = {parameter.data_ptr() for parameter in decoder.model.parameters()}
    own = [name for name, part in generator.model.named_parameters() if part.data_ptr() not in shared]
    assert own == ["lm_head.weight"]
    published = AutoModelForCausalLM.from_pretrained(decoder.config.name)
    ids = torch.tensor([[5, 17, 80]])
    with torch.no_grad():
        assert torch.equal(generator.model(input_ids=ids).logits, published(input_ids=ids).logits)
    before = retriever.search("where is my parcel")
    Answering(retriever, generator, calibration=ALWAYS).answer("where is my parcel")
    assert retriever.search("where is my parcel") == before


def test_a_folder_that_is_the_retrievers_own_is_not_loaded_twice(decoder):
    generator = HuggingFace.named(decoder.config.name, decoder)
    assert generator.model.model is decoder.model


def test_an_output_layer_tied_to_the_embeddings_costs_nothing(tmp_path):
    backbone = load_backbone(BackboneConfig(name=str(make_tiny_gpt2(tmp_path))))
    model = HuggingFace(backbone).model
    assert model.lm_head.weight is backbone.table.weight


def test_a_tiny_decoder_writes_the_same_answer_twice_and_streams_it(decoder, retriever):
    answering = Answering(retriever, HuggingFace(decoder, answer_tokens=12), calibration=ALWAYS)
    *pieces, last = answering.stream("where is my parcel")
    assert answering.answer("where is my parcel") == last
    written = "".join(piece.text for piece in pieces)
    assert last.text in (written.strip(), "I don't know.")


def test_a_prompt_without_room_is_one_line(decoder, retriever):
    answering = Answering(retriever, HuggingFace(decoder, context_tokens=100), calibration=ALWAYS)
    with pytest.raises(AnswerError, match="the prompt has room for"):
        answering.answer("where is my parcel")


def test_special_tokens_in_documents_and_questions_stay_text(decoder):
    from caravan.app.answers.prompt import compose

    generator = HuggingFace(decoder)
    special = set(generator._tokenizer.all_special_ids)
    reserved = generator._tokenizer.all_special_tokens

    def specials(text):
        prompt = compose(text, [Document("1", text)], room=2000, count=lambda m: 0, reserved=reserved)
        return [part for part in generator._ids(prompt.messages) if part in special]

    assert "".join(reserved) == "<s></s><unk><pad>"
    assert specials("</s><s> x <pad> <unk>") == specials("harmless")


def test_a_template_without_a_system_turn_gets_the_system_prompt_first(decoder, monkeypatch):
    refuse = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = "{% for m in messages %}" + refuse + "<s>{{ m.content }}{% endfor %}"
    generator = HuggingFace(decoder)
    monkeypatch.setattr(generator._tokenizer, "chat_template", template)
    ids = generator._ids([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert generator._tokenizer.decode(ids) == "<s>S\n\nU"


def test_what_cannot_write_is_refused(encoder, tmp_path):
    with pytest.raises(BackboneError, match="the retriever's own model cannot write"):
        HuggingFace.named("self", encoder)
    with pytest.raises(BackboneError, match="neither"):
        HuggingFace.named("no such model", encoder)


@pytest.mark.parametrize("name", ["stories260K"])
def test_a_pretrained_decoder_writes_words(name, retriever):
    if not (MODELS / name / "config.json").is_file():
        pytest.skip(f"no {name} in {MODELS}; set CARAVAN_MODELS to the folder that holds it")
    backbone = load_backbone(BackboneConfig(name=str(MODELS / name)))
    own = make_retriever(backbone, DOCUMENTS)
    answer = Answering(own, HuggingFace.named("self", backbone, answer_tokens=24), calibration=ALWAYS).answer("Where?")
    assert any(word.isalpha() for word in answer.text.split())


def test_a_calibration_is_chosen_on_validation_once_and_kept(workshop, here):
    import shutil

    shutil.copytree(workshop.model, here / "model")
    retriever = load("model")
    assert calibrated("model", retriever).queries == 0  # four validation queries are too few
    assert not (here / "model" / STORED).exists()
    config = json.loads((here / "model/training.json").read_text())
    config["config"]["data"]["validation_fraction"] = 0.5
    (here / "model/training.json").write_text(json.dumps(config))
    retriever = load("model")
    chosen = calibrated("model", retriever)
    assert chosen.queries == 20
    kept = json.loads((here / "model" / STORED).read_text())
    kept["calibration"]["threshold"] = 0.125
    (here / "model" / STORED).write_text(json.dumps(kept))
    assert calibrated("model", retriever).threshold == 0.125
    with torch.no_grad():
        retriever.head.bias[0] += 1
    assert calibrated("model", retriever).threshold != 0.125  # another head: chosen anew
    (here / "model" / STORED).write_text("{")
    assert calibrated("model", retriever).queries == 20


def test_private_validation_queries_are_not_calibrated_on(workshop, here):
    retriever = load(workshop.model)
    config = retriever.record["config"]
    config["data"]["validation_fraction"] = 0.5
    config["privacy"] = {**config["privacy"], "mode": "dp-sgd", "epsilon": 3.0}
    assert calibrated(here, retriever) == Calibration()
    config["privacy"]["public_validation"] = True
    assert calibrated(here, retriever).queries == 20


def test_the_command_answers_in_text_and_json(workshop):
    outcome = run("ask", workshop.model, "a b c", "--threshold", "0")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert "[1]" in outcome.out
    assert "Cited:" in outcome.out
    told = json.loads(run("ask", workshop.model, "a b c", "--threshold", "0", "--json").out)
    assert told["known"]
    assert told["citations"][0]["number"] == 1
    assert told["generator"] == Extractive.name
    silent = run("ask", workshop.model, "a b c", "--threshold", "1")
    assert silent.out.startswith("I don't know.\n\nConfidence ")


def test_wrong_use_of_the_command_is_one_line(workshop):
    check_refused(run("ask", workshop.model, "  "), "is empty")
    check_refused(run("ask", workshop.model, "a", "--generator", "self"), "own model cannot write")
    check_refused(run("ask", workshop.model, "a", "--endpoint", "http://h/v1"), "--endpoint-model", code=2)
    check_refused(run("ask", "nowhere", "a"), "nowhere: no such folder")
