package ai.pollard.client;

import io.grpc.EquivalentAddressGroup;
import io.grpc.NameResolver;
import io.grpc.NameResolverProvider;
import io.grpc.NameResolverRegistry;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.UnknownHostException;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Several servers as one target: "10.0.0.1:8001,10.0.0.2:8001". */
final class ServerList extends NameResolverProvider {
  private static final String SCHEME = "pollard-servers";
  private static final Pattern ADDRESS =
      Pattern.compile("([0-9.]+|\\[[0-9A-Fa-f:.]+\\]):([0-9]{1,5})");

  static {
    NameResolverRegistry.getDefaultRegistry().register(new ServerList());
  }

  private ServerList() {}

  private static boolean isList(String address) {
    return address.contains(",") && !address.contains(":///");
  }

  /** Whether an address may stand for several servers. */
  static boolean isSeveral(String address) {
    return isList(address) || address.startsWith("dns:");
  }

  /** Returns what gRPC dials. */
  static String target(String address, boolean encrypted) {
    if (!isList(address)) {
      return address;
    }
    if (encrypted) {
      throw new IllegalArgumentException(
          "the addresses \""
              + address
              + "\" have no one name that a certificate could be for: with TLS give dns:///NAME:PORT");
    }
    parse(address);
    return SCHEME + ":" + address.replace("[", "%5B").replace("]", "%5D");
  }

  private static List<EquivalentAddressGroup> parse(String list) {
    List<EquivalentAddressGroup> servers = new ArrayList<>();
    for (String part : list.split(",", -1)) {
      Matcher found = ADDRESS.matcher(part);
      if (!found.matches() || part.startsWith("[") != list.startsWith("[")) {
        throw notAnAddress(part, list);
      }
      try {
        // What looks like an IP address is not looked up.
        InetAddress host = InetAddress.getByName(found.group(1));
        int port = Integer.parseInt(found.group(2));
        if (port == 0) {
          throw notAnAddress(part, list);
        }
        servers.add(new EquivalentAddressGroup(new InetSocketAddress(host, port)));
      } catch (UnknownHostException | IllegalArgumentException invalid) {
        throw notAnAddress(part, list);
      }
    }
    return servers;
  }

  private static IllegalArgumentException notAnAddress(String part, String list) {
    return new IllegalArgumentException(
        "\""
            + part
            + "\" of the addresses \""
            + list
            + "\" must be an IP address with a port, all of one kind; for names give one that resolves"
            + " to all servers, as dns:///NAME:PORT");
  }

  @Override
  protected boolean isAvailable() {
    return true;
  }

  @Override
  protected int priority() {
    return 4; // Below DNS, whose scheme is that of addresses without one.
  }

  @Override
  public String getDefaultScheme() {
    return SCHEME;
  }

  @Override
  public NameResolver newNameResolver(URI target, NameResolver.Args args) {
    if (!SCHEME.equals(target.getScheme())) {
      return null;
    }
    List<EquivalentAddressGroup> servers = parse(target.getSchemeSpecificPart());
    return new NameResolver() {
      @Override
      public String getServiceAuthority() {
        return SCHEME;
      }

      @Override
      public void start(Listener2 listener) {
        listener.onResult(ResolutionResult.newBuilder().setAddresses(servers).build());
      }

      @Override
      public void shutdown() {}
    };
  }
}
