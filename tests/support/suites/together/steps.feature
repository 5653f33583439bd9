Feature: Sums
  Scenario: A sum that is right
    Given the numbers 1 and 2
    Then their sum is 3

  Scenario Outline: Sums of many
    Given the numbers <a> and <b>
    Then their sum is <c>

    Examples:
      | a | b | c |
      | 1 | 1 | 2 |
      | 1 | 1 | 3 |
