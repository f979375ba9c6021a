import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

/** Sends a body to each URL, by length and in chunks, and prints a line for each response. */
public class Client {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();  // offers `Upgrade: h2c` by default
        for (int each = 0; each < arguments.length; each += 2) {
            byte[] body = arguments[each + 1].getBytes("UTF-8");
            send(client, arguments[each], BodyPublishers.ofByteArray(body));
            send(client, arguments[each], BodyPublishers.ofInputStream(
                () -> new ByteArrayInputStream(body)));
        }
    }

    private static void send(HttpClient client, String url, BodyPublisher body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url))
            .header("Content-Type", "application/json").POST(body).build();
        var response = client.send(request, BodyHandlers.ofByteArray());
        System.out.println(response.statusCode() + " " + response.version() + " "
            + response.headers().firstValue("content-type").orElse("")
            + " " + response.body().length);
    }
}
