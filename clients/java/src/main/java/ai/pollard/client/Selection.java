package ai.pollard.client;

import java.util.regex.Pattern;

/**
 * Which revision of a model a call is for.
 *
 * @param revision a revision by number; 0 for none
 * @param alias an alias, such as "candidate"; empty for none
 * @param stickyKey calls with the same key get the same revision of a rollout; empty for none
 */
public record Selection(long revision, String alias, String stickyKey) {
  private static final Pattern MODEL = Pattern.compile("[a-z0-9][a-z0-9._-]{0,62}");

  /** The alias "production". */
  public static final Selection PRODUCTION = new Selection(0, "", "");

  /** Checks the values. */
  public Selection {
    if (revision < 0) {
      throw new IllegalArgumentException("revision must be 1 or more, not " + revision);
    }
    if (revision != 0 && !alias.isEmpty()) {
      throw new IllegalArgumentException("give a revision or an alias, not both");
    }
  }

  /** A revision by number. */
  public static Selection revision(long revision) {
    return new Selection(revision, "", "");
  }

  /** An alias, such as "candidate". */
  public static Selection alias(String alias) {
    return new Selection(0, alias, "");
  }

  /** With a key that stays with one revision of a rollout. */
  public Selection withStickyKey(String key) {
    return new Selection(revision, alias, key);
  }

  static String checkedModel(String model) {
    if (!MODEL.matcher(model).matches()) {
      throw new IllegalArgumentException(
          "model name \"" + model + "\" is not valid: use 1 to 63 characters out of a-z, 0-9, '-', '_' and '.',"
              + " beginning with a letter or digit");
    }
    return model;
  }
}
