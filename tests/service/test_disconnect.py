from service.disconnect import CLIENT, Client, client_of


def test_a_connection_raises_the_flag_of_the_request_it_carries() -> None:
    client = Client()
    calls: list[bool] = []
    client.on_disconnect = lambda: calls.append(client.disconnected)
    assert client_of({CLIENT: client}) is client
    client.disconnect()
    assert calls == [True]


def test_under_a_foreign_server_no_client_disconnects() -> None:
    client = client_of({"type": "http"})
    assert not client.disconnected
