from pathlib import Path

import pytest

from decode.settings import DecodeSettings
from deploy.cli import main, parser
from deploy.config import (
    KEYS,
    ROLES,
    Configuration,
    WrongSetting,
    from_environment,
    from_flag,
    from_yaml,
)
from deploy.options import configuration
from prefill.settings import PrefillSettings
from server.settings import GatewaySettings


def configured(
    *arguments: str, verb: str = "up", environment: dict[str, str] | None = None
) -> Configuration:
    return configuration(parser().parse_args([verb, *arguments]), verb, environment or {})


def a_file(folder: Path, text: str) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return file


def test_a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default(
    tmp_path: Path,
) -> None:
    file = str(a_file(tmp_path, "gateway: {port: 1}"))
    environment = {"HEADRACE_GATEWAY_PORT": "2"}
    ports = [
        found.settings("gateway", GatewaySettings).port
        for found in (
            configured(),
            configured("--config", file),
            configured("--config", file, environment=environment),
            configured("--config", file, "--port", "3", environment=environment),
        )
    ]
    assert ports == [8000, 1, 2, 3]


def test_the_cluster_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    file = a_file(tmp_path, "gateway: {port: 7}")
    found = configured(environment={"HEADRACE_CONFIG": str(file)})
    assert found.settings("gateway", GatewaySettings).port == 7


def test_an_empty_variable_counts_as_unset() -> None:
    assert from_environment({"HEADRACE_KV_TRANSPORT": ""}) == {}


def test_every_key_has_a_variable_of_its_own_and_a_meaning() -> None:
    assert len({key.replace(".", "_") for key in KEYS}) == len(KEYS)
    assert [key for key, what in KEYS.items() if not what.description] == []


def test_a_common_section_applies_to_all_roles_and_a_role_overrides_it(tmp_path: Path) -> None:
    file = a_file(
        tmp_path,
        "kv: {block_tokens: 32}\nprocess: {threads: 2}\ndecode: {process: {threads: 1}}\n",
    )
    found = Configuration(from_yaml(file))
    prefill = found.settings("prefill", PrefillSettings)
    decode = found.settings("decode", DecodeSettings)
    assert (prefill.kv.block_tokens, decode.kv.block_tokens) == (32, 32)
    assert (prefill.process.threads, decode.process.threads) == (2, 1)


def test_a_flag_for_all_roles_beats_what_the_file_says_of_one(tmp_path: Path) -> None:
    file = a_file(tmp_path, "decode: {kv: {transport: tcp}}")
    found = configured("--config", str(file), "--transport", "shm")
    assert found.settings("decode", DecodeSettings).kv.transport == "shm"


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("kv:\n  transprot: tcp\n", ":2", "did you mean kv.transport?"),
        ("prefil: {workers: 2}", ":1", "did you mean prefill?"),
        ("decode:\n  modle: {path: x}\n", ":2", "did you mean decode.model?"),
    ],
    ids=["key", "section", "section of a role"],
)
def test_an_unknown_key_in_the_file_names_line_and_nearest(
    tmp_path: Path, text: str, where: str, hint: str
) -> None:
    file = a_file(tmp_path, text)
    with pytest.raises(WrongSetting) as error:
        from_yaml(file)
    assert str(error.value).startswith(f"{file}{where}: unknown key")
    assert str(error.value).endswith(hint)


def test_an_unknown_variable_names_the_nearest() -> None:
    with pytest.raises(WrongSetting, match=r"did you mean HEADRACE_KV_TRANSPORT\?"):
        from_environment({"HEADRACE_KV_TRANSPROT": "tcp"})


def test_an_unknown_key_in_a_flag_names_the_nearest() -> None:
    with pytest.raises(WrongSetting, match=r"did you mean gateway\.port\?"):
        from_flag("gateway.prot", "1", "--set")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv: [1, 2]", "kv must hold keys"),
        ("- 1", "it must hold keys"),
        ("kv: {a: [}", "not YAML"),
        ("kv: &a {block_tokens: !!python/object/apply:os.system [ls]}", "not YAML"),
    ],
    ids=["list for a section", "list at the top", "syntax", "a tag that would run code"],
)
def test_a_file_that_is_no_cluster_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WrongSetting, match=message):
        from_yaml(a_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongSetting, match="cannot read"):
        from_yaml(tmp_path / "none.yaml")


def test_a_wrong_value_names_origin_and_key(tmp_path: Path) -> None:
    found = configured("--port", "eighty")
    with pytest.raises(WrongSetting, match=r"^--port: gateway\.port is 'eighty': "):
        found.settings("gateway", GatewaySettings)


def test_a_rule_over_several_keys_is_explained() -> None:
    found = configured("--host", "0.0.0.0")
    with pytest.raises(WrongSetting, match="api_keys_file"):
        found.settings("gateway", GatewaySettings)


def test_the_demo_cuts_ffns_on_decode_ranks_only() -> None:
    found = configured("smollm2")
    decode = found.settings("decode", DecodeSettings)
    prefill = found.settings("prefill", PrefillSettings)
    assert decode.model.path.endswith(".gguf")
    assert (decode.model.name, prefill.model.name) == ("smollm2", "smollm2")
    assert (decode.model.split_dense_experts, prefill.model.split_dense_experts) == (24, 0)


def test_the_demo_can_be_served_uncut() -> None:
    found = configured("smollm2", "--split-dense-experts", "0")
    assert found.settings("decode", DecodeSettings).model.split_dense_experts == 0


def test_a_model_is_named_after_its_path_unless_told() -> None:
    assert configured("/a/tiny-llama").settings("decode", DecodeSettings).model.name == "tiny-llama"
    named = configured("/a/tiny-llama", "--name", "tiny")
    assert named.settings("decode", DecodeSettings).model.name == "tiny"


def test_a_child_gets_the_same_settings_by_flags(tmp_path: Path) -> None:
    file = a_file(
        tmp_path, "kv: {transport: tcp}\ndecode: {kv_cache_bytes: 64MiB, group: {ranks: 4}}\n"
    )
    found = configured("smollm2", "--config", str(file), "--dtype", "float32").replace(
        {"decode.group.rank": 3}, "test"
    )
    again = configured(
        *found.flags("decode"), verb="decode", environment={"HEADRACE_KV_TRANSPORT": "shm"}
    )
    assert again.settings("decode", DecodeSettings) == found.settings("decode", DecodeSettings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--prot", "1"], "did you mean --port?"),
        (["up", "--set", "port=1"], "unknown key port"),
        (["up", "--set", "port"], "write --set KEY=VALUE"),
        (["up", "--port", "x"], "gateway.port is 'x'"),
        (["decode", "--rank", "2", "--ranks", "2"], "rank 2 is not one of 0..1"),
    ],
    ids=["option", "key", "no value", "type", "rank"],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err.splitlines()[-1]
    assert printed.out == ""


@pytest.mark.parametrize("role", ["gateway", "prefill", "decode"])
def test_a_role_without_a_model_says_how_to_name_one(
    role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([role]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no model is named: headrace {role} MODEL" in line


def test_the_example_of_a_cluster_file_is_valid_for_every_role() -> None:
    found = Configuration(from_yaml(Path(__file__).parents[3] / "deploy" / "cluster.example.yaml"))
    for role, kind in ROLES.items():
        assert found.settings(role, kind).model_fields_set != set()
